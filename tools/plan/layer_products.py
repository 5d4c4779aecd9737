"""Lists the matrix products of a layer as one rank computes them, for the time model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from recipes.common.model.decoder import Stack
from recipes.common.parallel.experts import bank_names
from recipes.common.parallel.tensor_parallel import plan_tensor_parallel
from recipes.common.recipe import WHOLE, Layout


@dataclass(frozen=True, kw_only=True)
class Product:
    """The matrices of one shape, [width, inner], on one rank."""

    width: float  # the side that tensor ranks divide
    inner: float
    rows: float = 1.0  # tokens that each sees, of one of the micro batch
    groups: float = 1.0  # so many in one launch
    bank: bool = False  # of experts


def layer_products(causal: Any, stack: Stack, layout: Layout) -> dict[Product, float]:
    """Return how many of each the mean layer has. Raises PlanError for what cannot be sharded so.

    Experts are taken to get equal shares of the tokens.
    """
    plan = plan_tensor_parallel(causal, stack, layout.tensor, whole_experts=layout.experts == WHOLE)
    spread = frozenset(bank_names(causal, stack)) if layout.expert > 1 else frozenset()
    config, layers = causal.config.get_text_config(), causal.get_submodule(stack.layers)
    chosen, counts = getattr(config, "num_experts_per_tok", None) or 1, Counter()
    for name, parameter in layers.named_parameters(prefix=stack.layers):
        if parameter.ndim not in (2, 3) or isinstance(causal.get_submodule(name.rpartition(".")[0]), nn.Embedding):
            continue
        width, inner = _split_side_first(parameter.shape[-2:], config.hidden_size)
        spec, experts = plan.shards.get(name), parameter.shape[0] if parameter.ndim == 3 else 1
        own = experts / (layout.expert if name in spread else 1)
        if spec is not None and parameter.ndim == 3 and spec.dim == 0:
            own /= layout.tensor
        elif spec is not None:
            width /= layout.tensor
        rows = chosen / experts * (layout.expert if name in spread else 1) if experts > 1 else 1.0
        counts[Product(width=width, inner=inner, rows=rows, groups=own, bank=parameter.ndim == 3)] += 1
    return {product: count / len(layers) for product, count in counts.items()}


def _split_side_first(sides: tuple[int, int], hidden: int) -> tuple[float, float]:
    """Return (the side that tensor ranks divide, the other): the one that is not as wide as the hidden states, or the wider."""
    first, second = sides
    if hidden in sides:
        return (float(first), float(second)) if second == hidden else (float(second), float(first))
    return float(max(sides)), float(min(sides))
