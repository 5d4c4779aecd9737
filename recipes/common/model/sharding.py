"""Says how each parameter is sharded over the tensor ranks, and experts besides over the expert ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # checkpoint files, and with them every tool, are read without torch
    import torch


@dataclass(frozen=True)
class ShardSpec:
    """A parameter sharded along `dim`. `packs` equal blocks lie one after another (gate and up, or q, k and v), each sharded.

    A block that the tensor size does not divide is padded at its end; only vocabularies and gathered outputs may need it.
    """

    dim: int
    packs: int = 1

    def local_length(self, length: int, size: int) -> int:
        """Return the length of one rank's shard along `dim`, padding included, for a global length."""
        return self.packs * -(-(length // self.packs) // size)

    def ranges(self, length: int, rank: int, size: int) -> list[tuple[int, int, int]]:
        """Return (local start, global start, count) of a rank's elements along `dim`, for a global length; no padding."""
        block = length // self.packs
        part = -(-block // size)
        start = min(rank * part, block)
        count = min(part, block - start)
        return [(pack * part, pack * block + start, count) for pack in range(self.packs)] if count else []

    def take(self, full: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """Return a rank's shard of the whole tensor, zero where padded."""
        shape = list(full.shape)
        shape[self.dim] = self.local_length(full.shape[self.dim], size)
        local = full.new_zeros(shape)
        for local_start, global_start, count in self.ranges(full.shape[self.dim], rank, size):
            local.narrow(self.dim, local_start, count).copy_(full.narrow(self.dim, global_start, count))
        return local


@dataclass(frozen=True)
class RankShard:
    """The part of a tensor that one tensor rank holds: all of it, or its shard."""

    spec: ShardSpec | None = None  # None: the whole
    rank: int = 0
    size: int = 1

    @property
    def dim(self) -> int:
        return 0 if self.spec is None else self.spec.dim

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Return the local shape, padding included."""
        if self.spec is None:
            return whole
        local = list(whole)
        local[self.dim] = self.spec.local_length(whole[self.dim], self.size)
        return tuple(local)

    def ranges(self, whole: tuple[int, ...]) -> list[tuple[int, int, int]]:
        """Return (local start, global start, count) along `dim`, no padding. A scalar counts as one row."""
        length = whole[self.dim] if whole else 1
        return [(0, 0, length)] if self.spec is None else self.spec.ranges(length, self.rank, self.size)

    def stored_elements(self, whole: tuple[int, ...]) -> int:
        """Return how many elements of the flattened shard come before the padding at its end."""
        if self.spec is None or self.dim or self.spec.packs > 1:
            return math.prod(self.shape(whole))  # no such shard is padded
        return math.prod(whole[1:]) * sum(count for _, _, count in self.ranges(whole))


def rank_shard(spec: ShardSpec | None, rank: int, size: int) -> RankShard:
    """Return a rank's shard; the whole tensor where it is replicated (spec None) or there is one rank."""
    return RankShard() if spec is None or size == 1 else RankShard(spec, rank, size)


@dataclass(frozen=True)
class HeldTensor:
    """What one rank holds of a tensor: its tensor rank's shard, or, of a bank of experts, one of the equal parts of that shard.

    The parts are by the shard's first dimension, so they lie one after another in the flattened shard: files know tensor ranks'
    shards alone.
    """

    shard: RankShard
    part: int = 0
    parts: int = 1

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Return the local shape, padding included."""
        first, *others = self.shard.shape(whole) or (1,)
        return (first // self.parts, *others) if whole else whole

    def start(self, whole: tuple[int, ...]) -> int:
        """Return how many elements of the tensor rank's flattened shard come before this rank's own."""
        return self.part * math.prod(self.shape(whole)) if self.parts > 1 else 0

    def take(self, full: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of the whole tensor, zero where padded."""
        shard = self.shard
        own = full if shard.spec is None else shard.spec.take(full, shard.rank, shard.size)
        return own if self.parts == 1 else own.chunk(self.parts)[self.part].clone()

    def boxes(self, whole: tuple[int, ...]) -> list[tuple[tuple[slice, ...], tuple[tuple[int, int], ...]]]:
        """Return (where in the local tensor, first and end along each dimension of the whole) of what is held, no padding."""
        found = []
        for local, start, count in self.shard.ranges(whole):
            here, there = [slice(None)] * len(whole), [(0, size) for size in whole]
            here[self.shard.dim], there[self.shard.dim] = slice(local, local + count), (start, start + count)
            if self.parts > 1:
                first, end = there[0]
                own = (end - first) // self.parts
                here[0], there[0] = slice(None), (first + self.part * own, first + (self.part + 1) * own)
            found.append((tuple(here), tuple(there)))
        return found

    def fill(self, local: torch.Tensor, whole: tuple[int, ...], value: float) -> None:
        """Fill what is no padding of this rank's part."""
        if not whole or self.parts > 1:  # no bank of experts is padded
            local.fill_(value)
            return
        for start, _, count in self.shard.ranges(whole):
            local.narrow(self.shard.dim, start, count).fill_(value)


@dataclass(frozen=True, kw_only=True)
class Holdings:
    """Which part of every parameter one rank holds."""

    shards: Mapping[str, ShardSpec] = field(default_factory=dict)  # a TensorPlan's
    tensor_rank: int = 0
    tensor: int = 1
    banks: frozenset[str] = frozenset()  # of experts, which expert ranks divide
    expert_rank: int = 0
    expert: int = 1

    def of(self, name: str) -> HeldTensor:
        shard = rank_shard(self.shards.get(name), self.tensor_rank, self.tensor)
        return HeldTensor(shard, self.expert_rank, self.expert) if name in self.banks else HeldTensor(shard)


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """A model's whole tensor-parallel plan for one tensor size, by names from the ForCausalLM's root."""

    size: int
    styles: dict[str, str]  # module -> style
    shards: dict[str, ShardSpec]  # parameter -> how it is sharded; a parameter that is not here is replicated
    divided: dict[str, tuple[str, ...]]  # module -> attributes that count the local shard, divided by the tensor size
    split_heads: frozenset[str]  # key and value projections whose shards are parts of one head (fewer heads than ranks)
    ranks_per_kv_head: int  # neighbouring tensor ranks that share one key/value head; 1: each rank has whole heads
    blocks: frozenset[str] = frozenset()  # with sequence parallelism, the modules that see whole sequences
