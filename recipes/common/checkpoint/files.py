"""Writes and checks a checkpoint: tensors in global Hugging Face coordinates, without a topology, in files without a pickle.

    step_00001000/
        rank_00000.safetensors ...   what each rank owned: fp32 fragments of weights and optimizer states
        index.json                   every tensor: its whole shape, how it was sharded, and where each part of it lies
        state.json                   step, consumed sequences, optimizer step, loss scaler, ...
        model/                       config.json and the tokenizer: all that an export needs
        checksums.json               the seal: size and checksum of every file above, written last, and the attempt

A fragment is consecutive elements of one parameter's local shard; `RankShard` says how that shard lies in the whole tensor. Any
later layout can read any rows of any tensor (`reader`), so a whole model never has to be in memory. Padding is never written.
Plain safetensors rather than torch.distributed.checkpoint: its metadata is a pickle, and its planner gathers every rank's plan on
one rank.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from recipes.common.config.inside import outside
from recipes.common.config.json_files import JsonError, read_json, write_json
from recipes.common.model.sharding import RankShard
from recipes.common.run_dir.checkpoint_folders import (
    SEAL,
    checkpoint_step,
    sealed_checkpoints,
)

FORMAT = "trifold-checkpoint"
VERSION = 1
CHUNK_BYTES = 1 << 20  # stays in the processor's cache between hashing and reading or writing: twice as fast as 16 MB
DTYPES = {"F32": np.float32, "I64": np.int64, "BOOL": np.bool_}
_PROBE_BYTES = 1 << 16
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
_RANK_FILE = re.compile(r"rank_\d+\.safetensors")
_NAMES = {np.dtype(value): key for key, value in DTYPES.items()}


class CheckpointError(RuntimeError):
    """A checkpoint that must not be used; the message says what was found where."""


@dataclass(frozen=True)
class Part:
    """Elements [start, stop) of one tensor rank's flattened shard of a parameter."""

    name: str
    kind: str
    shape: tuple[int, ...]  # of the whole tensor
    shard: RankShard
    start: int
    stop: int
    data: np.ndarray  # flat, [stop - start]; or an object with its size, nbytes, dtype and __array__, read when it is written


def write_rank_file(folder: Path, rank: int, parts: list[Part], token: str = "") -> dict[str, Any]:
    """Write this rank's parts, synced to disk. Return its report for `merge_index`. token: of the attempt that writes (Lease)."""
    header, offset, entries = {"__metadata__": {"format": FORMAT, "version": str(VERSION), "attempt": token}}, 0, []
    path = folder / f"rank_{rank:05d}.safetensors"
    for part in parts:
        key = f"{part.kind}:{part.name}"
        end = offset + part.data.nbytes
        header[key] = {"dtype": _NAMES[part.data.dtype], "shape": [part.data.size], "data_offsets": [offset, end]}
        spec, dtype = part.shard.spec, _NAMES[part.data.dtype]
        sharded = [None if spec is None else [spec.dim, spec.packs], part.shard.rank, part.shard.size]
        entries.append([part.name, part.kind, dtype, part.shape, *sharded, part.start, part.stop])
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
        "attempt": token,
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
    """Return the index of a checkpoint from its ranks' reports: name -> shape, sharding, file and offset of every part."""
    tensors: dict[str, Any] = {}
    for report in reports:
        offset = report["data_start"]
        for name, kind, dtype, shape, spec, tensor_rank, tensor_size, start, stop, checksum in report["parts"]:
            entry = tensors.setdefault(name, {"shape": list(shape), "shard": spec, "tensor_size": tensor_size, "kinds": {}})
            assert entry["shape"] == list(shape) and entry["tensor_size"] == tensor_size, name
            of_kind = entry["kinds"].setdefault(kind, {"dtype": dtype, "parts": []})
            of_kind["parts"].append([report["file"], offset, tensor_rank, start, stop, checksum])
            offset += (stop - start) * np.dtype(DTYPES[dtype]).itemsize
    for entry in tensors.values():
        for of_kind in entry["kinds"].values():
            of_kind["parts"].sort(key=lambda part: (part[2], part[3]))
    return {"format": FORMAT, "version": VERSION, "tensors": dict(sorted(tensors.items()))}


def seal(folder: Path, known: dict[str, dict[str, Any]], token: str = "") -> None:
    """Write the seal over every file in `folder`. known: sizes and checksums that writers already have, by file.

    token: of the attempt. Raises CheckpointError for a rank's file of another one.
    """
    files = {}
    others = [f"{name} is of attempt {report['attempt']}" for name, report in known.items() if report["attempt"] != token]
    if others:
        raise CheckpointError(f"{folder}: not sealed in attempt {token}: {'; '.join(others)}")
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SEAL):
        name = str(path.relative_to(folder))
        if name in known:
            files[name] = {key: known[name][key] for key in ("bytes", "checksum")}
        else:
            files[name] = {"bytes": path.stat().st_size, "checksum": file_checksum(path)}
            sync(path)
    write_json(folder / SEAL, {"format": FORMAT, "version": VERSION, "attempt": token, "files": files})
    for path in {folder, *(p for p in folder.rglob("*") if p.is_dir())}:
        sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
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
    """Return the seal. Raises CheckpointError when the folder was never sealed, the seal is damaged, or of another format."""
    try:
        # no key twice: one flipped bit makes rank_00000 of rank_00001, and would hide an entry
        content = read_json(folder / SEAL, unique=True)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{folder}: no {SEAL}, so it is not a finished checkpoint") from None
    except JsonError as error:
        raise CheckpointError(f"{error}; so it is damaged, and not a {FORMAT} of version {VERSION}") from None
    if (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        raise CheckpointError(f"{folder / SEAL}: not a {FORMAT} of version {VERSION}")
    files = content.get("files")
    if not isinstance(files, dict) or not all(map(_is_sealed, files.values())):
        raise CheckpointError(f"{folder / SEAL}: damaged (its list of files)")
    for name in files:
        if why := outside(folder, name):
            raise CheckpointError(f"{folder / SEAL}: {why}")
    if content.keys() - {"format", "version", "files", "attempt"} or not isinstance(content.get("attempt", ""), str):
        raise CheckpointError(f"{folder / SEAL}: damaged (its fields)")
    return content


def _is_sealed(entry: Any) -> bool:
    """Return whether an entry of the seal has what the writer gives each file."""
    if not isinstance(entry, dict) or entry.keys() != {"bytes", "checksum"}:
        return False
    size = entry["bytes"]
    return isinstance(size, int) and not isinstance(size, bool) and size >= 0 and isinstance(entry["checksum"], str)


def unsealed(folder: Path) -> list[str]:
    """Return the files, and links of any kind, that lie in a sealed folder and that its seal does not name.

    No resume reads them. What a file system keeps of an open file that was deleted (`.nfs...`) is none of them.
    """
    known = {SEAL, *read_seal(folder)["files"]}
    there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_symlink() or p.is_file()}
    return sorted(name for name in there - known if not Path(name).name.startswith(".nfs"))


def damage(folder: Path, *, stride: tuple[int, int] = (0, 1)) -> list[str]:
    """Return what is wrong with a checkpoint's files, a line each: damage, or files of two attempts.

    stride: (k, n) checks every n-th file from k on.
    """
    try:
        content = read_seal(folder)
        files, token = content["files"], content.get("attempt")
    except CheckpointError as error:
        return [str(error)]
    found = []
    for name, expected in sorted(files.items())[stride[0] :: stride[1]]:
        path = folder / name
        if not path.is_file():
            found.append(f"{path}: missing")
        elif path.stat().st_size != expected["bytes"]:
            found.append(f"{path}: has {path.stat().st_size} bytes, {expected['bytes']} were written")
        elif file_checksum(path) != expected["checksum"]:
            found.append(f"{path}: its content changed since it was written (checksum)")
        elif token is not None and _RANK_FILE.fullmatch(name) and (other := _attempt_of(path)) != token:
            found.append(
                f"{path}: was written by attempt {other or 'unknown'}, the checkpoint was sealed by {token or 'unknown'}"
            )
    return found


def _attempt_of(path: Path) -> str:
    """Return the attempt that a rank's file names, whose checksum is good."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        return str(header["__metadata__"].get("attempt", ""))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, struct.error):  # sealed by hand
        return ""


def write_model_folder(folder: Path, config: Any, tokenizer: Path) -> None:
    """Write config.json and the tokenizer's files: what an export needs beside the weights."""
    folder.mkdir(exist_ok=True)
    config.save_pretrained(folder)
    for path in tokenizer_files(tokenizer):
        if path.name != "generation_config.json":
            shutil.copyfile(path, folder / path.name)


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files that a tokenizer or generation reads, by their names. A folder of a whole model has weights too."""
    return sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()})


def writing_problems(out_dir: Path) -> list[str]:
    """Return why nothing can be written to --out-dir, or made there. Leaves nothing behind."""
    nearest = out_dir
    try:
        nearest = next(folder for folder in (out_dir, *out_dir.parents) if folder.exists())
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        cures = {errno.ENOSPC: "free some space there", errno.EDQUOT: "free some space there", errno.ENOTDIR: "it is a file"}
        cure = cures.get(error.errno, "give this user the right to write there")
        return [f"--out-dir={out_dir}: {nearest} cannot be written to: {error.strerror}; {cure}, or choose another folder"]
    return []


def out_dir_problems(out_dir: Path, resume_run: bool, resume_step: int | None = None) -> list[str]:
    """Return what is wrong with --out-dir: a fresh start must not mix checkpoints with another run's, and a resume needs one."""
    saved = sealed_checkpoints(out_dir)
    if saved and not resume_run:
        return [
            f"--out-dir={out_dir} holds checkpoints of a run, the newest {saved[-1].name}; continue it with --resume, or start "
            "afresh in another --out-dir"
        ]
    if resume_run and not saved:
        return [f"--resume: --out-dir={out_dir} holds no checkpoint to resume from; correct --out-dir, or start without --resume"]
    steps = [checkpoint_step(folder) for folder in saved]
    if resume_step is not None and resume_step not in steps:
        return [f"--resume-step={resume_step}: --out-dir={out_dir} holds checkpoints of steps {steps}; give one of these"]
    return []
