"""Reads a checkpoint's index.json and state.json, as far as they are what the seal says and lead to what it names."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from recipes.common.checkpoint.files import DTYPES, CheckpointError
from recipes.common.config.json_files import JsonError, parse_json

COUNTS = ("step", "consumed_seqs")  # of state.json; later ones are optional
OPTIONAL_COUNTS = ("skipped_steps", "optimizer_steps", "world_size")
MAX_ELEMENTS = 1 << 50


def read_state(folder: Path, files: dict[str, Any]) -> dict[str, Any]:
    """Return state.json. files: of the seal. Raises CheckpointError when it is not sealed, or has no counts."""
    state = _sealed(folder, "state.json", files)
    for key in (*COUNTS, *(key for key in OPTIONAL_COUNTS if key in state)):
        if not _is_count(state.get(key)):
            raise CheckpointError(f"{folder / 'state.json'}: {key}={state.get(key)!r} must be a whole number from 0 on")
    return state


def read_index(folder: Path, files: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors of index.json. Raises CheckpointError for one that leads out of the files that the seal names."""
    tensors = _sealed(folder, "index.json", files).get("tensors")
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{folder / 'index.json'}: lists no tensors")
    for name, entry in tensors.items():
        try:
            why = _wrong(entry, files)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            why = repr(error)
        if why:
            raise CheckpointError(f"{folder / 'index.json'}: {name} is not described as a tensor is ({why})")
    return tensors


def _sealed(folder: Path, name: str, files: dict[str, Any]) -> dict[str, Any]:
    if name not in files:
        raise CheckpointError(f"{folder / name}: the seal does not name it")
    try:
        raw = (folder / name).read_bytes()
        if f"xxh3_128:{xxhash.xxh3_128(raw).hexdigest()}" != files[name]["checksum"]:
            raise CheckpointError(f"{folder / name}: its content changed since it was written (checksum)")
        return parse_json(raw, str(folder / name))
    except (OSError, JsonError) as error:
        raise CheckpointError(str(error)) from None


def _wrong(entry: dict[str, Any], files: dict[str, Any]) -> str:
    """Return what is wrong with a tensor's entry; "" if it leads to bytes of sealed files alone."""
    shape, spec, size = entry["shape"], entry["shard"], entry["tensor_size"]
    if not isinstance(shape, list) or not all(map(_is_count, shape)) or math.prod(shape) > MAX_ELEMENTS:
        return f"shape {shape}"
    if not _is_count(size) or not (spec is None or (isinstance(spec, list) and len(spec) == 2)):
        return f"shard {spec} of {size}"
    for kind, of_kind in entry["kinds"].items():
        itemsize = np.dtype(DTYPES[of_kind["dtype"]]).itemsize
        for file, offset, rank, start, stop, _ in of_kind["parts"]:
            if not all(map(_is_count, (offset, rank, start, stop))) or start > stop:
                return f"{kind} has a part {[offset, rank, start, stop]}"
            if file not in files:
                return f"{kind} is in {file!r}, which the seal does not name"
            if offset + (stop - start) * itemsize > files[file]["bytes"]:
                return f"{kind} ends behind the end of {file}"
    return ""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
