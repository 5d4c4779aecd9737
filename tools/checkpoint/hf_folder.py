"""Finds the tensors of any Hugging Face model folder, by name: safetensors or PyTorch .bin files, mapped and not copied."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from tools.checkpoint.safetensors_writer import INDEX
from tools.common.console import UsageError

BIN_INDEX = "pytorch_model.bin.index.json"
# what a tokenizer or generation reads; copied as they are
TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "generation_config.json",
)
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_OTHERS = {"I64": torch.int64, "I32": torch.int32, "BOOL": torch.bool}


@dataclass(frozen=True)
class Source:
    """A tensor of a folder, mapped into memory where it is used. `place`: its safetensors file, or the tensor of a .bin file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    place: safe_open | torch.Tensor

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Return rows [first, last) in the stored dtype."""
        return (self.place if isinstance(self.place, torch.Tensor) else self.place.get_slice(self.name))[first:last]

    def whole(self) -> torch.Tensor:
        return self.place if isinstance(self.place, torch.Tensor) else self.place.get_tensor(self.name)


def open_folder(folder: Path) -> dict[str, Source]:
    """Return every tensor of a model folder. Raises UsageError naming what is missing or not readable."""
    problems: list[str] = []
    found: dict[str, Source] = {}
    for path in _weight_files(folder):
        if not path.is_file():
            problems.append(f"{path}: named by the index, but not there")
            continue
        try:
            here = _open_safetensors(path) if path.suffix == ".safetensors" else _open_bin(path)
        except UsageError as error:
            problems.append(str(error))
            continue
        problems += [f"{path}: {name} is in another file too" for name in here.keys() & found.keys()]
        found |= here
    if problems:
        raise UsageError(f"{folder} cannot be read:\n  " + "\n  ".join(problems))
    return found


def _weight_files(folder: Path) -> list[Path]:
    for index in (INDEX, BIN_INDEX):
        if (folder / index).is_file():
            try:
                names = set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise UsageError(f"{folder / index}: not an index of weights ({error!r})") from None
            if any(Path(name).name != name for name in names):
                raise UsageError(f"{folder / index}: names files outside the folder")
            return [folder / name for name in sorted(names)]
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
    raise UsageError(f"{folder}: no model.safetensors, {INDEX}, pytorch_model.bin or its index; there is {there}")


def _open_safetensors(path: Path) -> dict[str, Source]:
    try:
        file = safe_open(path, "pt")
    except SafetensorError as error:
        raise UsageError(f"{path}: not a whole safetensors file ({error})") from None
    found = {}
    for name in file.keys():  # noqa: SIM118, a handle is not iterable
        entry = file.get_slice(name)
        dtype = (_FLOATS | _OTHERS).get(entry.get_dtype())
        if dtype is None:
            raise UsageError(
                f"{path}: {name} is {entry.get_dtype()}; quantised weights cannot be trained, give the original model"
            )
        found[name] = Source(name, dtype, tuple(entry.get_shape()), file)
    return found


def _open_bin(path: Path) -> dict[str, Source]:
    """Read a pickle, but of tensors only: torch's restricted reader runs no code of the file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        reason = str(error).split("\n")[0]
        raise UsageError(f"{path}: not a file of plain tensors ({reason}); it was not loaded") from None
    tensors = {name: value for name, value in content.items() if torch.is_tensor(value)} if isinstance(content, dict) else {}
    if not tensors:
        raise UsageError(f"{path}: holds no tensors by name")
    return {name: Source(name, tensor.dtype, tuple(tensor.shape), tensor) for name, tensor in tensors.items()}


def tokenizer_files(folder: Path) -> list[Path]:
    return sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()})
