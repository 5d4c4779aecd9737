"""How each parameter lies over the tensor ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ShardSpec:
    """A parameter cut along `dim`. `packs` equal blocks lie one after another (gate and up, or q, k and v) and each is cut.

    A block that the tensor size does not divide is padded at its end; only vocabularies and gathered outputs may need it.
    """

    dim: int
    packs: int = 1

    def local_length(self, length: int, size: int) -> int:
        return self.packs * -(-(length // self.packs) // size)

    def pieces(self, length: int, rank: int, size: int) -> list[tuple[int, int, int]]:
        """(local start, global start, how many) along `dim`, for a global length. Padding belongs to no piece."""
        block = length // self.packs
        part = -(-block // size)
        start = min(rank * part, block)
        count = min(part, block - start)
        return [(pack * part, pack * block + start, count) for pack in range(self.packs)] if count else []

    def take(self, full: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """This rank's shard of the whole tensor, zero where padded."""
        shape = list(full.shape)
        shape[self.dim] = self.local_length(full.shape[self.dim], size)
        local = full.new_zeros(shape)
        for here, there, count in self.pieces(full.shape[self.dim], rank, size):
            local.narrow(self.dim, here, count).copy_(full.narrow(self.dim, there, count))
        return local


@dataclass(frozen=True)
class TensorPlan:
    """A model's whole tensor-parallel plan for one tensor size, by names from the ForCausalLM's root."""

    size: int
    styles: dict[str, str]  # module -> style
    cuts: dict[str, ShardSpec]  # parameter -> cut; a parameter that is not here is replicated
    divided: dict[str, tuple[str, ...]]
    kv_shared: frozenset[str]  # key and value projections cut below a head
    kv_share: int  # tensor ranks that share one key/value head (1: none)
    blocks: frozenset[str] = frozenset()  # with sequence parallelism, the modules that see whole sequences
