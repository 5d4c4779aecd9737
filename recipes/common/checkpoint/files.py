"""A checkpoint on disk: tensors in global Hugging Face coordinates, without a topology, in files that no pickle is in.

    step_00001000/
        rank_00000.safetensors ...   what each rank owned: fp32 fragments of weights and optimizer states
        index.json                   every tensor: its whole shape, and where each part of it lies in the files
        state.json                   step, consumed sequences, optimizer step, loss scaler, ...
        model/                       config.json and the tokenizer: all that an export needs
        checksums.json                the seal: size and checksum of every file above, written last

A fragment is a run of elements of one parameter's local shard; `ShardSpec` says how that shard lies in the whole tensor, so that
any rows of any tensor can be read by any later layout (`checkpoint_reader`), and a whole model never has to be in memory.
Padding is never written. Plain safetensors rather than torch.distributed.checkpoint: its metadata is a pickle, and its
planner gathers every rank's plan on one rank.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from recipes.common.model.sharding import ShardSpec
from recipes.common.run_dir.manifest import write_json

FORMAT = "trifold-checkpoint"
VERSION = 1
SEAL = "checksums.json"
CHUNK_BYTES = 1 << 20  # stays in the processor's cache between hashing and reading or writing: twice as fast as 16 MB
DTYPES = {"F32": np.float32, "I64": np.int64, "BOOL": np.bool_}
_NAMES = {np.dtype(value): key for key, value in DTYPES.items()}


class CheckpointError(RuntimeError):
    """A checkpoint that must not be used; the message says what was found where."""


@dataclass(frozen=True)
class Part:
    """Elements [start, stop) of the flattened shard of one parameter on one tensor rank."""

    name: str
    kind: str
    shape: tuple[int, ...]  # of the whole tensor
    cut: ShardSpec | None
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
        for part, entry in zip(parts, entries, strict=True):
            of_part = xxhash.xxh3_64()
            _write(file, memoryview(np.ascontiguousarray(part.data)).cast("B"), digest, of_part)
            entry.append(of_part.hexdigest())
        os.fsync(file.fileno())
    data_start = 8 + len(text)
    return {
        "file": path.name,
        "bytes": data_start + offset,
        "checksum": f"xxh3_128:{digest.hexdigest()}",
        "data_start": data_start,
        "parts": entries,
    }


def _write(file: Any, data: memoryview, *digests: Any) -> None:
    while data:
        chunk = data[:CHUNK_BYTES]
        for digest in digests:
            digest.update(chunk)
        while chunk:  # an unbuffered write may take a part only
            chunk = chunk[file.write(chunk) :]
        data = data[CHUNK_BYTES:]


def merge_index(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The index of a checkpoint from its ranks' reports: name -> shape, cut, and every part's file and byte offset."""
    tensors: dict[str, Any] = {}
    for report in reports:
        offset = report["data_start"]
        for name, kind, dtype, shape, cut, tensor_rank, tensor, start, stop, checksum in report["parts"]:
            entry = tensors.setdefault(name, {"shape": list(shape), "cut": cut, "tensor": tensor, "kinds": {}})
            assert entry["shape"] == list(shape) and entry["tensor"] == tensor, name
            of_kind = entry["kinds"].setdefault(kind, {"dtype": dtype, "parts": []})
            of_kind["parts"].append([report["file"], offset, tensor_rank, start, stop, checksum])
            offset += (stop - start) * np.dtype(DTYPES[dtype]).itemsize
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
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(CHUNK_BYTES))
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


def step_folder(out_dir: Path, step: int) -> Path:
    return out_dir / "checkpoints" / f"step_{step:08d}"


def sealed_checkpoints(out_dir: Path) -> list[Path]:
    """Checkpoints that carry their final name, oldest first."""
    return sorted((out_dir / "checkpoints").glob("step_[0-9]*"))


def write_model_folder(folder: Path, config: Any, tokenizer: Path) -> None:
    """config.json and the tokenizer's files: what an export needs beside the weights."""
    folder.mkdir(exist_ok=True)
    config.save_pretrained(folder)
    if tokenizer.is_dir():
        for path in tokenizer.iterdir():
            if path.is_file() and path.name not in ("config.json", "generation_config.json"):
                shutil.copyfile(path, folder / path.name)


def publish_folder(hidden: Path, folder: Path) -> None:
    """Give a sealed folder its name, and point `latest` at it. Each step is atomic."""
    if folder.exists():  # the same step, saved again after a resume
        old = folder.with_name(f".{folder.name}.replaced")
        os.replace(folder, old)
        os.replace(hidden, folder)
        shutil.rmtree(old)
    else:
        os.replace(hidden, folder)
    _point_latest(folder)
    descriptor = os.open(folder.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _point_latest(folder: Path) -> None:
    pointer = folder.with_name(".latest")
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(folder.name)
    os.replace(pointer, folder.with_name("latest"))


def abandon_later(out_dir: Path, step: int) -> list[Path]:
    """The run goes on from `step`: later checkpoints move to checkpoints/abandoned, where no resume looks.

    Gives their new places. What an earlier return left there is deleted: the folder holds no more than a run keeps.
    """
    later = [folder for folder in sealed_checkpoints(out_dir) if checkpoint_step(folder) > step]
    if not later:
        return []
    _point_latest(step_folder(out_dir, step))
    place = out_dir / "checkpoints" / "abandoned"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for folder in reversed(later):  # newest first: cut short, what is left is nearest to where the run goes on
        os.replace(folder, place / folder.name)
    return [place / folder.name for folder in later]


def checkpoint_step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def out_dir_problems(out_dir: Path, resume_run: bool, resume_step: int | None = None) -> list[str]:
    """A fresh start must not mix its checkpoints with another run's, and a resume needs one to go on from."""
    saved = sealed_checkpoints(out_dir)
    if saved and not resume_run:
        return [
            f"--out-dir={out_dir} holds checkpoints of a run, the newest {saved[-1].name}; go on from it with --resume, or start "
            "afresh in another --out-dir"
        ]
    if resume_run and not saved:
        return [f"--resume: --out-dir={out_dir} holds no checkpoint to go on from; correct --out-dir, or start without --resume"]
    steps = [checkpoint_step(folder) for folder in saved]
    if resume_step is not None and resume_step not in steps:
        return [f"--resume-step={resume_step}: --out-dir={out_dir} holds checkpoints of the steps {steps}; give one of these"]
    return []
