"""Finds the tensors of any Hugging Face model folder, by name: in safetensors or PyTorch .bin files, read one at a time.

What `transformers` would load is what is found. Files are read and not mapped, or dropped again: a mapped file would count as
memory of this process, page by page.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from recipes.common.checkpoint.files import tokenizer_files
from recipes.common.config.inside import outside
from recipes.common.config.json_files import JsonError, read_json
from tools.checkpoint.safetensors_writer import INDEX
from tools.common.console import UsageError

BIN_INDEX = "pytorch_model.bin.index.json"
# in the order in which transformers looks for them: what it finds first is the model, whatever else lies there
PLACES = ("model.safetensors", INDEX, "pytorch_model.bin", BIN_INDEX)
MAPPED_BYTES = 256 << 20  # of a .bin file, until its mapping is renewed
POINTER = b"version https://git-lfs.github.com/spec/"
_QUANTISED = "quantised weights cannot be trained, give the original model"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_OTHERS = {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


class BinFile:
    """A PyTorch .bin file, mapped; the mapping is renewed now and then, or the whole file would stay in memory."""

    def __init__(self, path: Path, content: dict[str, torch.Tensor]) -> None:
        self.path, self.content, self.read_bytes = path, content, 0

    def tensor(self, name: str) -> torch.Tensor:
        if self.read_bytes > MAPPED_BYTES and zipfile.is_zipfile(self.path):
            self.content, self.read_bytes = _load_bin(self.path), 0
        self.read_bytes += self.content[name].nbytes
        return self.content[name].detach()


@dataclass(frozen=True)
class Source:
    """A tensor of a folder, on disk. `place`: where its bytes begin in a safetensors file, or the .bin file that holds it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    place: int | BinFile

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Return rows [first, last) in the stored dtype."""
        if isinstance(self.place, BinFile):
            return self.place.tensor(self.name)[first:last]
        return self._read(first * math.prod(self.shape[1:]), (last - first, *self.shape[1:]))

    def whole(self) -> torch.Tensor:
        return self.place.tensor(self.name) if isinstance(self.place, BinFile) else self._read(0, self.shape)

    def _read(self, start: int, shape: tuple[int, ...]) -> torch.Tensor:
        """Read elements from `start` on. Raises UsageError when the file ends before."""
        tensor = torch.empty(shape, dtype=self.dtype)
        view = memoryview(tensor.view(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.place + start * tensor.element_size())
            while view:
                count = file.readinto(view)
                if not count:
                    raise UsageError(f"{self.path}: ends within {self.name}; fetch it again")
                view = view[count:]
        return tensor


def open_folder(folder: Path) -> dict[str, Source]:
    """Return every tensor of a model folder. Raises UsageError naming what is missing or not readable."""
    problems: list[str] = []
    found: dict[str, Source] = {}
    for path in _weight_files(folder):
        try:
            if why := outside(folder, path.name):
                raise UsageError(f"{folder}: {why}")
            if not path.is_file():
                raise UsageError(f"{path}: named by the index, but not there; fetch it again")
            refuse_pointer(path)
            here = _open_safetensors(path) if path.suffix == ".safetensors" else _open_bin(path)
        except UsageError as error:
            problems.append(str(error))
            continue
        problems += [f"{path}: {name} is in another file too" for name in here.keys() & found.keys()]
        found |= here
    if problems:
        raise UsageError(f"{folder} cannot be read:\n  " + "\n  ".join(problems))
    return found


def unread_weights(folder: Path) -> list[str]:
    """Return the names of weights or indexes that lie in the folder too and that transformers does not load either."""
    there = [name for name in PLACES if (folder / name).is_file()]
    return there[1:]


def refuse_pointer(path: Path) -> None:
    """Raise UsageError for a Git LFS pointer: the name of a file that was not fetched."""
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise UsageError(f"{path}: a Git LFS pointer, not the file itself; fetch it with: git lfs pull")


def _weight_files(folder: Path) -> list[Path]:
    there = next((name for name in PLACES if (folder / name).is_file()), None)
    if there is None:
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        raise UsageError(f"{folder}: no model.safetensors, {INDEX}, pytorch_model.bin or its index; there is {names}")
    if there not in (INDEX, BIN_INDEX):
        return [folder / there]
    refuse_pointer(folder / there)
    try:
        weight_map = read_json(folder / there).get("weight_map")
    except JsonError as error:
        raise UsageError(f"{error}; fetch it again") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{folder / there}: not an index of weights, it has no weight_map")
    names = list(weight_map.values())
    wrong = [str(name) for name in names if not isinstance(name, str) or Path(name).name != name]
    if wrong:
        raise UsageError(f"{folder / there}: names files outside the folder: {', '.join(sorted(set(wrong))[:5])}")
    return [folder / name for name in sorted(set(names))]


def _open_safetensors(path: Path) -> dict[str, Source]:
    try:
        with safe_open(path, "pt"):  # the library checks the header, sizes and offsets
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise UsageError(f"{path}: not a whole safetensors file ({error}); fetch it again") from None
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        dtype = (_FLOATS | _OTHERS).get(entry["dtype"])
        if dtype is None:
            raise UsageError(f"{path}: {name} is {entry['dtype']}; {_QUANTISED}")
        found[name] = Source(name, dtype, tuple(entry["shape"]), path, 8 + length + entry["data_offsets"][0])
    return found


def _load_bin(path: Path) -> Any:
    """Read a pickle, but of tensors only: torch's restricted reader runs no code of the file."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _open_bin(path: Path) -> dict[str, Source]:
    try:
        content = _load_bin(path)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).split("\n")[0]
        raise UsageError(f"{path}: not a file of plain tensors ({reason}); it was not loaded") from None
    tensors = {name: value for name, value in content.items() if torch.is_tensor(value)} if isinstance(content, dict) else {}
    if not tensors or not all(isinstance(name, str) for name in tensors):
        raise UsageError(f"{path}: holds no tensors by name")
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided:
            raise UsageError(f"{path}: {name} is {tensor.layout}; store it whole, with .to_dense()")
        if tensor.dtype not in (*_FLOATS.values(), *_OTHERS.values()):
            raise UsageError(f"{path}: {name} is {tensor.dtype}; {_QUANTISED}")
    file = BinFile(path, content)
    return {name: Source(name, tensor.dtype, tuple(tensor.shape), path, file) for name, tensor in tensors.items()}


def strip_names(sources: dict[str, Source], parts: Iterable[str]) -> dict[str, Source]:
    """Return the tensors without `PART.` in their names, wherever it stands. Raises UsageError if two would have one name."""
    found: dict[str, Source] = {}
    for name, source in sources.items():
        short = stripped(name, parts)
        if short in found:
            raise UsageError(f"--strip: {found[short].name} and {name} would both be {short}")
        found[short] = source
    return found


def stripped(name: str, parts: Iterable[str]) -> str:
    for part in parts:
        name = re.sub(rf"(^|\.){re.escape(part)}\.", r"\1", name)
    return name


def readable_tokenizer_files(folder: Path) -> list[Path]:
    """Return the tokenizer's files. Raises UsageError for a link to elsewhere, or a Git LFS pointer."""
    found = tokenizer_files(folder)
    for path in found:
        if why := outside(folder, path.name):
            raise UsageError(f"{folder}: {why}")
        refuse_pointer(path)
    return found
