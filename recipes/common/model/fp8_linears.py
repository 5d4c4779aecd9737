"""Finds the linears of a model's layers that can multiply in fp8.

These are the plain linears of the decoder layers. Left out are routers, whose small differences choose the experts; banks of
experts; and linears whose width is no multiple of what tensor cores read at once, such as gates of one output. Embedding and head
are outside the layers.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from recipes.common.model.decoder import Stack
from recipes.common.model.fp8 import MULTIPLE
from recipes.common.model.routers import find_routers


def find_fp8_linears(causal: PreTrainedModel, stack: Stack) -> tuple[str, ...]:
    """Return the names of the linears, of a whole model with all its layers."""
    routers = [f"{name}." for name in find_routers(causal, stack)]
    return tuple(
        name
        for name, module in causal.get_submodule(stack.layers).named_modules(prefix=stack.layers)
        if type(module) is nn.Linear
        and not any(size % MULTIPLE for size in module.weight.shape)
        and not f"{name}.".startswith(tuple(routers))
    )


def multiply_in_fp8(causal: PreTrainedModel, stack: Stack) -> None:
    """Let those linears multiply in fp8, where `linears` routes their products."""
    for name in find_fp8_linears(causal, stack):
        causal.get_submodule(name).in_fp8 = True
