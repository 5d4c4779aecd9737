"""Counts the parameters of a model that one rank holds, and what it multiplies tokens by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recipes.common.model.decoder import PlanError, Stack
from recipes.common.model.flops import matrices_of
from recipes.common.parallel.experts import bank_names
from recipes.common.parallel.tensor_parallel import plan_tensor_parallel
from recipes.common.recipe import WHOLE, Layout


def rank_params(causal: Any, stack: Stack, layout: Layout) -> dict[str, float] | str:
    """Return {"embedding", "head", "norm" or a layer's index: parameters on one rank}, or why it cannot be sharded so."""
    try:
        sharded = plan_tensor_parallel(causal, stack, layout.tensor, whole_experts=layout.experts == WHOLE).shards
        parts = dict.fromkeys(sharded, float(layout.tensor))
        for name in bank_names(causal, stack) if layout.expert > 1 else ():
            parts[name] = parts.get(name, 1.0) * layout.expert
    except PlanError as error:
        return str(error)
    return _count(causal, stack, parts, layout.tensor)


def rank_matrices(causal: Any, stack: Stack, layout: Layout) -> list[float]:
    """Return the elements of each layer's matrices that a tensor rank multiplies a token by: all of those that no plan shards.

    Raises PlanError where the model cannot be sharded so.
    """
    shards = plan_tensor_parallel(causal, stack, layout.tensor, whole_experts=layout.experts == WHOLE).shards
    sharded = {id(parameter) for name, parameter in causal.named_parameters() if name in shards}
    chosen = getattr(causal.config.get_text_config(), "num_experts_per_tok", None)
    return [
        sum(size / (layout.tensor if id(parameter) in sharded else 1.0) for parameter, size in matrices_of(layer, chosen))
        for layer in causal.get_submodule(stack.layers)
    ]


def expert_counts(causal: Any, stack: Stack) -> frozenset[int] | None:
    """Return how many experts the banks of a model have; None where experts cannot be spread over ranks."""
    try:
        return frozenset(causal.get_parameter(name).shape[0] for name in bank_names(causal, stack))
    except PlanError:
        return None


def expert_sizes(counts: frozenset[int] | None, data: int) -> list[int]:
    """Return the numbers of expert ranks worth a look: powers of two that divide the data ranks and the experts."""
    if counts is None:
        return [1]
    powers = (2**power for power in range(data.bit_length()))
    return [size for size in powers if not any(number % size for number in (data, *counts))]


def _count(causal: Any, stack: Stack, parts: Mapping[str, float], tensor: int) -> dict[str, float]:
    """parts: the parameters that ranks divide, and by how many."""
    counts: dict[str, float] = {"embedding": 0.0, "head": 0.0, "norm": 0.0}
    first = tuple(f"{name}." for name in stack.before)
    for name, parameter in causal.named_parameters():
        size = parameter.numel() / parts.get(name, 1.0)
        if name.startswith(f"{stack.layers}."):
            part = name[len(stack.layers) + 1 :].partition(".")[0]
        elif name.startswith(f"{stack.head}.") and not stack.tied:
            part = "head"
        elif name.startswith((f"{stack.embedding}.", *first)):
            part = "embedding"
        else:
            part = "norm"
        counts[part] = counts.get(part, 0.0) + size
    if stack.tied:
        counts["head"] = causal.get_submodule(stack.embedding).weight.numel() / tensor
    return counts
