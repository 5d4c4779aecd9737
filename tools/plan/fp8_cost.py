"""Counts what products in fp8 change of a step: the share of the work that is faster, and the casts before it."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from recipes.common.model.decoder import Stack
from recipes.common.model.fp8_linears import find_fp8_linears
from recipes.common.model.sharding import rank_shard
from recipes.common.parallel.tensor_parallel import plan_tensor_parallel

# bytes an element of a factor, from bf16: the largest is found once (2 read), and it is cast for two products (2 read, 1 written)
CAST_BYTES = 2.0 + 2 * 3.0


@dataclass(frozen=True, kw_only=True)
class Fp8Cost:
    """Of the mean layer on one tensor rank."""

    multiplied: float = 0.0  # multiply-adds a token in fp8, over all tensor ranks
    token_bytes: float = 0.0  # that casts move for each token of a micro batch
    weight_bytes: float = 0.0  # and for each micro batch, however long


def fp8_cost(causal: PreTrainedModel, stack: Stack, tensor: int) -> Fp8Cost:
    """Return the cost with `tensor` ranks. causal: the whole model."""
    plan = plan_tensor_parallel(causal, stack, tensor)
    names = find_fp8_linears(causal, stack)
    whole = {name: tuple(causal.get_submodule(name).weight.shape) for name in names}
    shards = [rank_shard(plan.shards.get(f"{name}.weight"), 0, tensor).shape(shape) for name, shape in whole.items()]
    layers = len(causal.get_submodule(stack.layers))
    return Fp8Cost(
        multiplied=sum(rows * columns for rows, columns in whole.values()) / layers,
        token_bytes=CAST_BYTES * sum(rows + columns for rows, columns in shards) / layers,
        weight_bytes=CAST_BYTES * sum(rows * columns for rows, columns in shards) / layers,
    )
