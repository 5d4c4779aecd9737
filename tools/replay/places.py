"""Says where this rank's part of an activation lies in the whole: in the step's sequences, their places, and the features."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from recipes.common.model.sharding import ShardSpec
from recipes.common.parallel.grid import Grid
from tools.replay.whole_shapes import PLACES, SEQS, TOKENS, Dims

OF_READER = "reader"  # begins the place of what holds sequences
Chosen = tuple[torch.Tensor | None, torch.Tensor]  # of a dimension: its elements that count (None: all), where they are


@dataclass(frozen=True)
class RankPlace:
    """What a rank must know of itself and of the batch."""

    grid: Grid
    seq_len: int
    micro_seqs: int

    @property
    def own_places(self) -> int:
        """Return how many places of a sequence this rank has: all, or a context rank's slice."""
        return self.seq_len // self.grid.context


class Places:
    """Places the tensors of one rank. The index in the whole is what `fingerprint` adds up from the dimensions."""

    def __init__(self, setting: RankPlace, dims: Mapping[tuple[str, str], Dims], shards: Mapping[str, ShardSpec]) -> None:
        """dims: see `whole_shapes`. shards: modules whose output is cut in packs or padded, and how."""
        self._setting, self._dims, self._shards = setting, dims, shards

    def of_ids(self, ids: torch.Tensor, micro_batch: int) -> tuple[list[torch.Tensor], str]:
        """Return where ids [sequences, places] are, and which part they are."""
        setting = self._setting
        seqs, places = self._seqs(micro_batch), setting.grid.context_rank * setting.own_places + torch.arange(ids.shape[1])
        return [seqs * setting.seq_len, places], self._reader()

    def of_activation(self, kind: str, name: str, tensor: torch.Tensor, micro_batch: int) -> tuple[list[Chosen], str, bool]:
        """Return (for each dimension, what counts and where it is), which part it is, whether all that is of the whole."""
        dims = self._dims.get((kind, name))
        found = None
        if dims is not None and len(dims) == tensor.ndim:
            found = self._placed(kind, name, dims, tuple(tensor.shape), micro_batch)
        return self._unplaced(tensor, micro_batch) if found is None else found

    def of_head(
        self, kind: str, name: str, tensor: torch.Tensor, micro_batch: int, first_token: int
    ) -> tuple[list[Chosen], str, bool]:
        """Do the same for what the head reads and returns: some tokens of a micro batch at a time, [1, tokens, ..]."""
        dims = self._dims.get((kind, name))
        if dims is None or len(dims) != tensor.ndim or dims[:2] != (SEQS, PLACES) or tensor.shape[0] != 1:
            return self._unplaced(tensor, micro_batch)
        tokens = self._tokens(first_token + torch.arange(tensor.shape[1]), self._setting.own_places, 0, micro_batch)
        features = self._features(kind, name, dims[2:], tuple(tensor.shape[2:]), 2)
        if features is None:
            return self._unplaced(tensor, micro_batch)
        chosen, part, whole = features
        return [(None, torch.zeros(1, dtype=torch.int64)), (None, tokens * whole), *chosen], self._reader() + part, True

    def _placed(
        self, kind: str, name: str, dims: Dims, shape: tuple[int, ...], micro_batch: int
    ) -> tuple[list[Chosen], str, bool] | None:
        setting, chosen, part = self._setting, [], ""
        sizes = self._sizes(dims)
        if SEQS in dims or TOKENS in dims:
            part += self._reader()
        elif PLACES in dims and setting.grid.context > 1:
            part += f"context {setting.grid.context_rank} "
        cut = 0
        for dim, (size, length) in enumerate(zip(dims, shape, strict=True)):
            stride = math.prod(sizes[dim + 1 :])
            if size == SEQS:
                if length != setting.micro_seqs:
                    return None
                chosen.append((None, self._seqs(micro_batch) * stride))
            elif size in (PLACES, TOKENS):
                own = length if size == PLACES else length // setting.micro_seqs
                first = self._first_place(own)
                if first is None:
                    return None
                part += f"places from {first} " if own < setting.own_places else ""
                if size == PLACES:
                    there = setting.grid.context_rank * setting.own_places + first + torch.arange(length)
                else:
                    there = self._tokens(torch.arange(length), own, first, micro_batch)
                chosen.append((None, there * stride))
            else:
                found = self._along(kind, name, dim, size, length)
                cut += found is not None and bool(found[1])
                if found is None or cut > 1:
                    return None
                here, there = found[0]
                chosen.append((here, there * stride))
                part += found[1]
        return chosen, part, True

    def _features(
        self, kind: str, name: str, dims: Dims, shape: tuple[int, ...], first_dim: int
    ) -> tuple[list[Chosen], str, int] | None:
        chosen, part, sizes = [], "", [size for size in dims if isinstance(size, int)]
        for number, length in enumerate(shape):
            found = self._along(kind, name, first_dim + number, sizes[number], length)
            if found is None:
                return None
            (here, there), own = found
            chosen.append((here, there * math.prod(sizes[number + 1 :])))
            part += own
        return chosen, part, math.prod(sizes)

    def _along(self, kind: str, name: str, dim: int, size: int, length: int) -> tuple[Chosen, str] | None:
        """Place a dimension of features, of which this rank has `length` of `size`, padding included."""
        grid = self._setting.grid
        if length == size:
            return (None, torch.arange(length)), ""
        spec = self._shards.get(name) if kind == "output" else None
        if length == ShardSpec(0, spec.packs if spec else 1).local_length(size, grid.tensor) and (
            spec or size % grid.tensor == 0
        ):
            ranges = ShardSpec(0, spec.packs if spec else 1).ranges(size, grid.tensor_rank, grid.tensor)
            here = [torch.arange(a, a + count) for a, _, count in ranges]
            there = [torch.arange(b, b + count) for _, b, count in ranges]
            empty = torch.zeros(0, dtype=torch.int64)
            return (torch.cat([empty, *here]), torch.cat([empty, *there])), f"features of tensor rank {grid.tensor_rank} "
        parts = size // length if length and size % length == 0 else 0
        if not parts or grid.tensor % parts:
            return None
        number = grid.tensor_rank // (grid.tensor // parts)  # neighbouring tensor ranks share a key/value head
        return (None, number * length + torch.arange(length)), f"features {number} of {parts} "

    def _sizes(self, dims: Dims) -> list[int]:
        """Return the whole sizes, for strides; how many sequences there are does not count, as they come first."""
        known = {SEQS: 1, PLACES: self._setting.seq_len, TOKENS: 1}
        return [size if isinstance(size, int) else known[size] for size in dims]

    def _first_place(self, own: int) -> int | None:
        """Return the first of this rank's places, within its context rank's: not 0 where tensor ranks share a sequence."""
        setting = self._setting
        if own == setting.own_places:
            return 0
        return setting.grid.tensor_rank * own if own * setting.grid.tensor == setting.own_places else None

    def _seqs(self, micro_batch: int) -> torch.Tensor:
        """Return the numbers, in the step, of this rank's sequences of a micro batch."""
        setting = self._setting
        first = (micro_batch * setting.grid.readers + setting.grid.reader) * setting.micro_seqs
        return first + torch.arange(setting.micro_seqs)

    def _tokens(self, flat: torch.Tensor, own: int, first: int, micro_batch: int) -> torch.Tensor:
        """Return the numbers, in the step, of tokens that lie flat: `own` places of each sequence, from `first` on."""
        setting = self._setting
        places = setting.grid.context_rank * setting.own_places + first + flat % own
        return self._seqs(micro_batch)[flat // own] * setting.seq_len + places

    def _reader(self) -> str:
        grid = self._setting.grid
        return f"{OF_READER} {grid.reader} " + (f"context {grid.context_rank} " if grid.context > 1 else "")

    def _unplaced(self, tensor: torch.Tensor, micro_batch: int) -> tuple[list[Chosen], str, bool]:
        """Place a tensor of unknown shape by itself: the same rank of the same layout has the same part."""
        strides = [math.prod(tensor.shape[dim + 1 :]) for dim in range(tensor.ndim)]
        there = [torch.arange(length) * stride for length, stride in zip(tensor.shape, strides, strict=True)]
        if there:
            there[0] = there[0] + micro_batch * tensor.numel()
        return [(None, place) for place in there], f"rank {self._setting.grid.rank} ", False
