"""Says how a micro batch's gradients are added to those before, and how many bytes that moves."""

from __future__ import annotations

from typing import Any

from recipes.common.config.ds_config import sums_gradients_by_step
from recipes.common.recipe import FP8, Recipe

SUMMED_APART = 10.0  # bytes a parameter and micro batch: a 16-bit gradient is read, the fp32 sum read and written
SUM_READ = 4.0  # of them, that a step's first micro batch does not: it writes its gradients over the last step's
HEAD_SUMMED = 12.0  # fp16's of the head in fp32, scaled as it is added
ROW_SUMMED = 18.0  # bytes an element of a token's row in the embedding: to fp32, and picked, added and put
SUMMED_INSIDE = 8.0  # a product reads and writes the sum, in the place of the 2 bytes of its result


def sums_inside_products(recipe: Recipe, ds_config: dict[str, Any]) -> bool:
    """Return whether linears add their weights' gradients to the step's sums in the products (see `model.main_grads`)."""
    return sums_gradients_by_step(ds_config) and recipe.precision != FP8
