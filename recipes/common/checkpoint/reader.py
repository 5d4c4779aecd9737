"""Random access to a checkpoint's tensors, for any later layout and for export: any rows of any tensor, from the files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from recipes.common.checkpoint.files import CHUNK_BYTES, DTYPES, CheckpointError, read_seal
from recipes.common.model.sharding import ShardSpec


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
    """Random access to a sealed checkpoint's tensors by name, straight from the files."""

    def __init__(self, folder: Path) -> None:
        read_seal(folder)
        self.folder = folder
        self.state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        self.tensors: dict[str, Any] = json.loads((folder / "index.json").read_text(encoding="utf-8"))["tensors"]

    def damaged_parts(self, kind: str) -> Iterator[tuple[int, str | None]]:
        """For every part of a kind: (its bytes, what is wrong or None). Reads nothing of the other kinds."""
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

    def rows(self, name: str, kind: str, first: int, last: int) -> np.ndarray:
        """Rows [first, last) of the whole tensor, as a new array. Raises CheckpointError when any of it is not there."""
        entry = self.tensors[name]
        shape, size = entry["shape"], entry["tensor"]
        out = np.empty((last - first, *shape[1:]), dtype=DTYPES[entry["kinds"][kind]["dtype"]])
        if entry["cut"] is None:
            self._local(name, kind, 0, first, out)
            return out
        cut = ShardSpec(*entry["cut"])
        for rank in range(size):
            pieces = cut.ranges(shape[cut.dim], rank, size)
            if cut.dim == 0:
                for here, there, count in pieces:
                    begin, end = max(there, first), min(there + count, last)
                    if begin < end:
                        self._local(name, kind, rank, here + begin - there, out[begin - first : end - first])
                continue
            local = list(out.shape)
            local[cut.dim] = cut.local_length(shape[cut.dim], size)
            shard = np.empty(local, dtype=out.dtype)
            self._local(name, kind, rank, first, shard)
            for here, there, count in pieces:
                into = (slice(None),) * cut.dim + (slice(there, there + count),)
                source = (slice(None),) * cut.dim + (slice(here, here + count),)
                out[into] = shard[source]
        return out

    def whole(self, name: str, kind: str) -> np.ndarray:
        shape = self.shape(name)
        return self.rows(name, kind, 0, shape[0]) if shape else self._scalar(name, kind)

    def _scalar(self, name: str, kind: str) -> np.ndarray:
        out = np.empty((1,), dtype=DTYPES[self.tensors[name]["kinds"][kind]["dtype"]])
        self._local(name, kind, 0, 0, out)
        return out.reshape(())

    def _local(self, name: str, kind: str, tensor_rank: int, first_row: int, out: np.ndarray) -> None:
        """Fill `out` with rows of one tensor rank's shard, starting at `first_row`, from the parts that hold them."""
        flat = out.reshape(-1)
        assert flat.base is not None
        begin = first_row * math.prod(out.shape[1:])
        end, filled = begin + flat.size, 0
        of_kind = self.tensors[name]["kinds"][kind]
        for file, offset, rank, start, stop, _ in of_kind["parts"]:
            low, high = max(start, begin), min(stop, end)
            if rank != tensor_rank or low >= high:
                continue
            _read_into(self.folder / file, offset + (low - start) * out.itemsize, flat[low - begin : high - begin])
            filled += high - low
        if filled != flat.size:
            raise CheckpointError(f"{self.folder}: {flat.size - filled} elements of {kind} {name} are in no file")

    def shard(self, name: str, kind: str, cut: ShardSpec | None, rank: int, size: int, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of the flattened shard that (cut, rank, size) has of the tensor; zero where padded."""
        shape = self.shape(name)
        local = list(shape)
        if cut is not None and size > 1:
            local[cut.dim] = cut.local_length(shape[cut.dim], size)
        width = math.prod(local[1:])
        first, last = start // width, -(-stop // width)
        out = np.zeros((last - first, *local[1:]), dtype=np.float32)
        if cut is None or size == 1:
            out[:] = self.rows(name, kind, first, last)
        elif cut.dim == 0:
            for here, there, count in cut.ranges(shape[0], rank, size):
                begin, end = max(here, first), min(here + count, last)
                if begin < end:
                    out[begin - first : end - first] = self.rows(name, kind, there + begin - here, there + end - here)
        else:
            rows = self.rows(name, kind, first, last)
            for here, there, count in cut.ranges(shape[cut.dim], rank, size):
                into = (slice(None),) * cut.dim + (slice(here, here + count),)
                source = (slice(None),) * cut.dim + (slice(there, there + count),)
                out[into] = rows[source]
        return out.reshape(-1)[start - first * width : stop - first * width]
