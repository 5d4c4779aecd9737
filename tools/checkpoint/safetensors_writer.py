"""Writes safetensors files block by block: no tensor has to be in memory whole. The safetensors library reads them.

A file is 8 bytes of header length, a JSON header (name -> dtype, shape, where its bytes are), and the bytes, without gaps
(https://github.com/huggingface/safetensors, "Format"). The header follows from the shapes, so it is written first.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import xxhash

from recipes.common.checkpoint.files import CHUNK_BYTES

ITEM_BYTES = {"F32": 4, "I64": 8, "F16": 2, "BF16": 2, "BOOL": 1}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Tensor:
    """A tensor to write."""

    name: str
    dtype: str  # as safetensors writes it: "F32", "BF16", ...
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def split_into_shards(tensors: list[Tensor], shard_bytes: int) -> dict[str, list[Tensor]]:
    """Return {file name: its tensors, in order}; a file holds at most `shard_bytes`, or one tensor that is larger."""
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, 1)}


class ShardsWriter:
    """Writes the tensors of `shards` one after another, each from any number of blocks; use it in a `with`.

    `checksums` holds each finished tensor's. Leaving the `with` raises AssertionError when bytes are missing.
    """

    def __init__(self, folder: Path, shards: dict[str, list[Tensor]]) -> None:
        self.checksums: dict[str, str] = {}
        self._folder = folder
        self._todo = [(file, tensor) for file, tensors in shards.items() for tensor in tensors]
        self._shards, self._file, self._name = shards, None, ""
        self._next, self._missing, self._digest = 0, 0, xxhash.xxh3_128()

    def __enter__(self) -> ShardsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            assert self._missing == 0 and self._next == len(self._todo), "not every tensor was written"
        self._close(synced=kind is None)

    def write(self, name: str, data: np.ndarray) -> None:
        """Write the next bytes of tensor `name`; tensors come in the order of the shards."""
        if self._missing == 0:
            self._start(name)
        assert name == self._name, f"{name} was written where {self._name} belongs"
        view = memoryview(np.ascontiguousarray(data).reshape(-1)).cast("B")
        self._missing -= len(view)
        assert self._missing >= 0, f"more bytes of {name} than its shape holds"
        while view:  # an unbuffered write may take a part only
            count = self._file.write(view[:CHUNK_BYTES])
            self._digest.update(view[:count])
            view = view[count:]
        if self._missing == 0:
            self.checksums[name] = self._digest.hexdigest()

    def _start(self, name: str) -> None:
        file, tensor = self._todo[self._next]
        assert tensor.name == name, f"{name} was written where {tensor.name} belongs"
        if file != self._name_of_open_file():
            self._close(synced=True)
            self._file = (self._folder / file).open("wb", buffering=0)
            self._file.write(_header(self._shards[file]))
        self._next += 1
        self._name, self._missing = name, tensor.nbytes
        self._digest.reset()

    def _name_of_open_file(self) -> str | None:
        return None if self._file is None else Path(self._file.name).name

    def _close(self, *, synced: bool) -> None:
        if self._file is not None:
            if synced:
                os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def _header(tensors: list[Tensor]) -> bytes:
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    offset = 0
    for tensor in tensors:
        place = [offset, offset + tensor.nbytes]
        content[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": place}
        offset = place[1]
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    return struct.pack("<Q", len(text)) + text


def write_index(folder: Path, shards: dict[str, list[Tensor]]) -> None:
    """Write `model.safetensors.index.json`, where there is more than one file."""
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors)
        names = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
