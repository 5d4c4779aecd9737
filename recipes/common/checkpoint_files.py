"""A checkpoint on disk: tensors in global Hugging Face coordinates, without a topology, in files that no pickle is in.

    step_00001000/
        rank_00000.safetensors ...   what each rank owned: fp32 fragments of weights and optimizer states
        index.json                   every tensor: its whole shape, and where each part of it lies in the files
        state.json                   step, consumed sequences, optimizer step, loss scaler, ...
        model/                       config.json, generation_config.json and the tokenizer: all that an export needs
        manifest.json                the seal: size and checksum of every file above, written last

A fragment is a run of elements of one parameter's local shard; `Cut` says how that shard lies in the whole tensor, so that
any rows of any tensor can be read by any later layout (`Reader.rows`), and a whole model never has to be in memory.
Padding is never written. Plain safetensors rather than torch.distributed.checkpoint: its metadata is a pickle, and its
planner gathers every rank's plan on one rank.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from recipes.common.run_files import write_json
from recipes.common.tensor_parallel import Cut

FORMAT = "trifold-checkpoint"
VERSION = 1
SEAL = "manifest.json"
_CHUNK_BYTES = 1 << 20  # stays in the processor's cache between hashing and reading or writing: twice as fast as 16 MB
_DTYPES = {"F32": np.float32, "I64": np.int64, "BOOL": np.bool_}
_NAMES = {np.dtype(value): key for key, value in _DTYPES.items()}


class CheckpointError(RuntimeError):
    """A checkpoint that must not be used; the message says what was found where."""


@dataclass(frozen=True)
class Part:
    """Elements [start, stop) of the flattened shard of one parameter on one tensor rank."""

    name: str
    kind: str
    shape: tuple[int, ...]  # of the whole tensor
    cut: Cut | None
    tensor_rank: int
    tensor: int  # tensor-parallel size
    start: int
    stop: int
    data: np.ndarray  # flat, [stop - start]


def write_rank_file(folder: Path, rank: int, parts: list[Part]) -> dict[str, Any]:
    """Write this rank's parts, synced to disk. Gives {"file", "bytes", "checksum", "parts"} for the index."""
    header, offset, entries = {"__metadata__": {"format": FORMAT, "version": str(VERSION)}}, 0, []
    path = folder / f"rank_{rank:05d}.safetensors"
    for part in parts:
        key = f"{part.kind}:{part.name}"
        end = offset + part.data.nbytes
        header[key] = {"dtype": _NAMES[part.data.dtype], "shape": [part.data.size], "data_offsets": [offset, end]}
        cut = None if part.cut is None else [part.cut.dim, part.cut.packs]
        entries.append(
            [
                part.name,
                part.kind,
                _NAMES[part.data.dtype],
                part.shape,
                cut,
                part.tensor_rank,
                part.tensor,
                part.start,
                part.stop,
            ]
        )
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns its data
    digest = xxhash.xxh3_128()
    with path.open("wb", buffering=0) as file:
        _write(file, memoryview(struct.pack("<Q", len(text)) + text), digest)
        for part in parts:
            _write(file, memoryview(np.ascontiguousarray(part.data)).cast("B"), digest)
        os.fsync(file.fileno())
    data_start = 8 + len(text)
    return {
        "file": path.name,
        "bytes": data_start + offset,
        "checksum": f"xxh3_128:{digest.hexdigest()}",
        "data_start": data_start,
        "parts": entries,
    }


def _write(file: Any, data: memoryview, digest: Any) -> None:
    while data:
        chunk = data[:_CHUNK_BYTES]
        digest.update(chunk)
        while chunk:  # an unbuffered write may take a part only
            chunk = chunk[file.write(chunk) :]
        data = data[_CHUNK_BYTES:]


def merge_index(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The index of a checkpoint from its ranks' reports: name -> shape, cut, and every part's file and byte offset."""
    tensors: dict[str, Any] = {}
    for report in reports:
        offset = report["data_start"]
        for name, kind, dtype, shape, cut, tensor_rank, tensor, start, stop in report["parts"]:
            entry = tensors.setdefault(name, {"shape": list(shape), "cut": cut, "tensor": tensor, "kinds": {}})
            assert entry["shape"] == list(shape) and entry["tensor"] == tensor, name
            of_kind = entry["kinds"].setdefault(kind, {"dtype": dtype, "parts": []})
            of_kind["parts"].append([report["file"], offset, tensor_rank, start, stop])
            offset += (stop - start) * np.dtype(_DTYPES[dtype]).itemsize
    for entry in tensors.values():
        for of_kind in entry["kinds"].values():
            of_kind["parts"].sort(key=lambda part: (part[2], part[3]))
    return {"format": FORMAT, "version": VERSION, "tensors": dict(sorted(tensors.items()))}


def seal(folder: Path, known: dict[str, dict[str, Any]]) -> None:
    """Write the manifest over every file in `folder`; `known` gives the sizes and checksums that writers already have."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SEAL):
        name = str(path.relative_to(folder))
        if name in known:
            files[name] = {key: known[name][key] for key in ("bytes", "checksum")}
        else:
            files[name] = {"bytes": path.stat().st_size, "checksum": file_checksum(path)}
            _sync(path)
    write_json(folder / SEAL, {"format": FORMAT, "version": VERSION, "files": files})
    for path in {folder, *(p for p in folder.rglob("*") if p.is_dir())}:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_checksum(path: Path) -> str:
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return f"xxh3_128:{digest.hexdigest()}"


def read_seal(folder: Path) -> dict[str, Any]:
    """The manifest. Raises CheckpointError when the folder was never sealed, the seal is damaged, or of another format."""
    try:
        manifest = json.loads((folder / SEAL).read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{folder}: no {SEAL}, so it is not a finished checkpoint") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / SEAL}: damaged ({error})") from None
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise CheckpointError(f"{folder / SEAL}: not a {FORMAT} of version {VERSION}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(f, dict) and f.keys() == {"bytes", "checksum"} for f in files.values()):
        raise CheckpointError(f"{folder / SEAL}: damaged (its list of files)")
    return manifest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A name that comes twice hides the other entry: one flipped bit makes rank_00000 of rank_00001."""
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name comes twice")
    return content


def damage(folder: Path, *, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with a checkpoint's files, a line each. `share`=(k, n): look at every n-th file from k on only."""
    try:
        files = read_seal(folder)["files"]
    except CheckpointError as error:
        return [str(error)]
    found = []
    for name, expected in sorted(files.items())[share[0] :: share[1]]:
        path = folder / name
        if not path.is_file():
            found.append(f"{path}: missing")
        elif path.stat().st_size != expected["bytes"]:
            found.append(f"{path}: {path.stat().st_size} bytes, {expected['bytes']} were written")
        elif file_checksum(path) != expected["checksum"]:
            found.append(f"{path}: its content changed since it was written (checksum)")
    return found


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


class Reader:
    """Random access to a sealed checkpoint's tensors by name, straight from the files."""

    def __init__(self, folder: Path) -> None:
        read_seal(folder)
        self.folder = folder
        self.state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        self.tensors: dict[str, Any] = json.loads((folder / "index.json").read_text(encoding="utf-8"))["tensors"]

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
        out = np.empty((last - first, *shape[1:]), dtype=_DTYPES[entry["kinds"][kind]["dtype"]])
        if entry["cut"] is None:
            self._local(name, kind, 0, first, out)
            return out
        cut = Cut(*entry["cut"])
        for rank in range(size):
            pieces = cut.pieces(shape[cut.dim], rank, size)
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
        out = np.empty((1,), dtype=_DTYPES[self.tensors[name]["kinds"][kind]["dtype"]])
        self._local(name, kind, 0, 0, out)
        return out.reshape(())

    def _local(self, name: str, kind: str, tensor_rank: int, first_row: int, out: np.ndarray) -> None:
        """Fill `out` with rows of one tensor rank's shard, starting at `first_row`, from the parts that hold them."""
        flat = out.reshape(-1)
        assert flat.base is not None
        begin = first_row * math.prod(out.shape[1:])
        end, filled = begin + flat.size, 0
        of_kind = self.tensors[name]["kinds"][kind]
        for file, offset, rank, start, stop in of_kind["parts"]:
            low, high = max(start, begin), min(stop, end)
            if rank != tensor_rank or low >= high:
                continue
            _read_into(self.folder / file, offset + (low - start) * out.itemsize, flat[low - begin : high - begin])
            filled += high - low
        if filled != flat.size:
            raise CheckpointError(f"{self.folder}: {flat.size - filled} elements of {kind} {name} are in no file")

    def shard(self, name: str, kind: str, cut: Cut | None, rank: int, size: int, start: int, stop: int) -> np.ndarray:
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
            for here, there, count in cut.pieces(shape[0], rank, size):
                begin, end = max(here, first), min(here + count, last)
                if begin < end:
                    out[begin - first : end - first] = self.rows(name, kind, there + begin - here, there + end - here)
        else:
            rows = self.rows(name, kind, first, last)
            for here, there, count in cut.pieces(shape[cut.dim], rank, size):
                into = (slice(None),) * cut.dim + (slice(here, here + count),)
                source = (slice(None),) * cut.dim + (slice(there, there + count),)
                out[into] = rows[source]
        return out.reshape(-1)[start - first * width : stop - first * width]
