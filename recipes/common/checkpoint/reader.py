"""Reads any part of a checkpoint's tensors straight from its files, for any later layout and for export.

Global rows count in the whole tensor, local ones in the shard of the tensor rank that wrote it; elements, in a flattened shard.
`RankShard.ranges` maps local to global along the sharded dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from recipes.common.checkpoint.files import CHUNK_BYTES, DTYPES, CheckpointError, read_seal
from recipes.common.checkpoint.sealed_json import read_index, read_state
from recipes.common.model.sharding import RankShard, ShardSpec


def _read_into(path: Path, position: int, out: np.ndarray) -> None:
    """Fill a contiguous array from a file, without a copy between. Raises CheckpointError when the file ends before."""
    view = memoryview(out).cast("B")
    with path.open("rb", buffering=0) as file:
        file.seek(position)
        while view:  # one read takes 2 GB at most
            count = file.readinto(view)
            if not count:
                raise CheckpointError(f"{path}: ends before the tensors that index.json says are in it")
            view = view[count:]


def _part_checksum(path: Path, position: int, count: int) -> str:
    digest, buffer = xxhash.xxh3_64(), memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        file.seek(position)
        while count and (got := file.readinto(buffer[: min(count, CHUNK_BYTES)])):
            digest.update(buffer[:got])
            count -= got
    return digest.hexdigest()


class Reader:
    """Random access to a sealed checkpoint's tensors by name. All that is read is named in the seal, and inside the folder."""

    def __init__(self, folder: Path) -> None:
        files = read_seal(folder)["files"]
        self.folder = folder
        self.state: dict[str, Any] = read_state(folder, files)
        self.tensors: dict[str, Any] = read_index(folder, files)

    def damaged_parts(self, kind: str) -> Iterator[tuple[int, str | None]]:
        """Yield (its bytes, what is wrong or None) of every part of a kind. Reads nothing of the other kinds."""
        for name in self.names(kind):
            of_kind = self.tensors[name]["kinds"][kind]
            itemsize = np.dtype(DTYPES[of_kind["dtype"]]).itemsize
            for file, offset, _, start, stop, checksum in of_kind["parts"]:
                count = (stop - start) * itemsize
                wrong = _part_checksum(self.folder / file, offset, count) != checksum
                yield count, f"{self.folder / file}: {kind} of {name} changed since it was written (checksum)" if wrong else None

    def names(self, kind: str) -> Iterator[str]:
        return (name for name, entry in self.tensors.items() if kind in entry["kinds"])

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name]["shape"])

    def kinds(self) -> set[str]:
        return {kind for entry in self.tensors.values() for kind in entry["kinds"]}

    def written_shards(self, name: str) -> list[RankShard]:
        """Return what the tensor ranks of the run that wrote the tensor held of it: one whole tensor, or every shard."""
        entry = self.tensors[name]
        if entry["shard"] is None:
            return [RankShard()]
        return [RankShard(ShardSpec(*entry["shard"]), rank, entry["tensor_size"]) for rank in range(entry["tensor_size"])]

    def whole(self, name: str, kind: str) -> np.ndarray:
        shape = self.shape(name)
        return self.rows(name, kind, 0, shape[0]) if shape else self.rows(name, kind, 0, 1).reshape(())

    def rows(self, name: str, kind: str, first: int, last: int) -> np.ndarray:
        """Return global rows [first, last) as a new array. Raises CheckpointError when any of it is not there."""
        shape = self.shape(name)
        assert 0 <= first <= last <= (shape[0] if shape else 1), (name, first, last)
        out = np.empty((last - first, *shape[1:]), dtype=DTYPES[self.tensors[name]["kinds"][kind]["dtype"]])
        for shard in self.written_shards(name):
            if shard.dim == 0:
                for local_start, global_start, count in shard.ranges(shape):
                    low, high = max(global_start, first), min(global_start + count, last)
                    if low < high:
                        local_rows = out[low - first : high - first]
                        self._read_rows(name, kind, shard.rank, local_start + low - global_start, local_rows)
            else:
                local_rows = np.empty((last - first, *shard.shape(shape)[1:]), dtype=out.dtype)
                self._read_rows(name, kind, shard.rank, first, local_rows)
                for local_start, global_start, count in shard.ranges(shape):
                    out[_along(shard.dim, global_start, count)] = local_rows[_along(shard.dim, local_start, count)]
        return out

    def shard(self, name: str, kind: str, shard: RankShard, start: int, stop: int) -> np.ndarray:
        """Return elements [start, stop) of any shard of the tensor, flattened, fp32; zero where padded."""
        shape = self.shape(name)
        local_shape = shard.shape(shape)
        width = math.prod(local_shape[1:])
        first, last = start // width, -(-stop // width)  # local rows
        out = np.zeros((last - first, *local_shape[1:]), dtype=np.float32)
        if shard.dim == 0:
            for local_start, global_start, count in shard.ranges(shape):
                low, high = max(local_start, first), min(local_start + count, last)
                if low < high:
                    to_global = global_start - local_start
                    out[low - first : high - first] = self.rows(name, kind, low + to_global, high + to_global)
        else:
            global_rows = self.rows(name, kind, first, last)
            for local_start, global_start, count in shard.ranges(shape):
                out[_along(shard.dim, local_start, count)] = global_rows[_along(shard.dim, global_start, count)]
        return out.reshape(-1)[start - first * width : stop - first * width]

    def _read_rows(self, name: str, kind: str, rank: int, first: int, out: np.ndarray) -> None:
        """Fill `out` with local rows of tensor rank `rank`, from row `first` on, from the parts that hold them."""
        flat = out.reshape(-1)
        assert flat.base is not None
        begin = first * math.prod(out.shape[1:])  # elements
        end, filled = begin + flat.size, 0
        for file, offset, part_rank, start, stop, _ in self.tensors[name]["kinds"][kind]["parts"]:
            low, high = max(start, begin), min(stop, end)
            if part_rank != rank or low >= high:
                continue
            _read_into(self.folder / file, offset + (low - start) * out.itemsize, flat[low - begin : high - begin])
            filled += high - low
        if filled != flat.size:
            raise CheckpointError(f"{self.folder}: {flat.size - filled} elements of {kind} {name} are in no file")


def _along(dim: int, start: int, count: int) -> tuple[slice, ...]:
    """Return the index of [start, start + count) along `dim`."""
    return (slice(None),) * dim + (slice(start, start + count),)
