"""The output folder as every host sees it, and the bytes of a few shards.

Saves need one file system under all hosts: rank 0 writes a word that nobody can guess, every host reads it and writes an answer
that rank 0 reads. Hosts write their test files at the same time, as they do in a save.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.common.data.shards import Shard, read_manifest, split_shards
from recipes.common.recipe import AdamW, Optimizer

WRITE_BYTES = 8 << 30  # by all hosts together, each between the two that follow; less where WRITE_SECONDS are over first
LEAST_BYTES, MOST_BYTES = 16 << 20, 256 << 20
WRITE_SECONDS = 3.0
CHUNK_BYTES = 4 << 20
FLUSH_BYTES = 32 << 20  # at a time, so that the clock is looked at between
SEEN_SECONDS = 10.0  # a network file system may show a new file late
SAMPLED_SHARDS = 4  # a host, fewer where the seconds are over first


def open_folder(out_dir: Path, nonce: str) -> dict[str, Any]:
    """Rank 0: make out_dir/.preflight_NONCE with the word in it."""
    out_dir.mkdir(parents=True, exist_ok=True)
    folder = out_dir / f".preflight_{nonce}"
    folder.mkdir()
    try:
        (folder / "word").write_text(nonce)
    except OSError:  # a full disk
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return {"folder": str(folder)}


def storage_facts(out_dir: Path, nonce: str, host: tuple[int, int]) -> dict[str, Any]:
    """A host's first rank: is rank 0's word here, how much is free, and how fast is a test file written (bytes a second)?

    host: (this one, of how many). Leaves `answer_HOST` in the folder for rank 0. Errors are facts too.
    """
    folder = out_dir / f".preflight_{nonce}"
    facts: dict[str, Any] = {
        "sees_word": _see(folder / "word", nonce, time.monotonic() + SEEN_SECONDS),
        "free_bytes": None,
        "write_bytes_per_second": None,
    }
    existing = next(path for path in (out_dir, *out_dir.parents) if path.is_dir())
    facts["free_bytes"] = shutil.disk_usage(existing).free
    if not facts["sees_word"]:
        return facts
    try:
        (folder / f"answer_{host[0]}").write_text(nonce)
        facts["write_bytes_per_second"] = _write_speed(folder / f"speed_{host[0]}", host[1])
    except OSError as error:
        facts["write_error"] = f"{error.strerror} (errno {error.errno})"
    return facts


def _see(path: Path, word: str, deadline: float) -> bool:
    while True:
        try:
            os.listdir(path.parent.parent)  # a network file system looks again at a folder that is listed
            if path.read_text() == word:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def _write_speed(path: Path, hosts: int) -> float:
    """Bytes a second into a new file, the flush to disk included. The file is removed."""
    size = min(max(WRITE_BYTES // hosts, LEAST_BYTES), MOST_BYTES)
    chunk = random.randbytes(CHUNK_BYTES)  # what compresses or repeats would look fast
    written, started = 0, time.perf_counter()
    try:
        with path.open("wb", buffering=0) as file:
            while written < size and time.perf_counter() - started < WRITE_SECONDS:
                written += file.write(chunk)
                if written % FLUSH_BYTES == 0:
                    os.fsync(file.fileno())
            os.fsync(file.fileno())
        return written / (time.perf_counter() - started)
    finally:
        path.unlink(missing_ok=True)


def read_answers(out_dir: Path, nonce: str, hosts: Sequence[int]) -> dict[str, Any]:
    """Rank 0: {"unseen": hosts whose answer is not to be seen here, "saved_bytes": of checkpoints}. Removes the folder."""
    folder = out_dir / f".preflight_{nonce}"
    deadline = time.monotonic() + SEEN_SECONDS
    unseen = [host for host in hosts if not _see(folder / f"answer_{host}", nonce, deadline)]
    shutil.rmtree(folder, ignore_errors=True)
    return {"unseen": unseen, "saved_bytes": _bytes_saved(out_dir)}


def sample_shards(folders: Sequence[Path], host: tuple[int, int], seconds: float) -> tuple[int, list[str]]:
    """(shards whose checksums were compared, those that differ): another few on every host. host: (this one, of how many)."""
    shards = [(folder, shard) for folder in folders for shard in _train_and_validation(folder)]
    random.Random(0).shuffle(shards)  # equal on every host: each then takes its own part
    number, hosts = host
    turn = number * len(shards) // hosts
    deadline = time.monotonic() + seconds
    compared, bad = 0, []
    for folder, shard in (shards[turn:] + shards[:turn])[:SAMPLED_SHARDS]:
        for name, expected in shard.checksums.items():
            digest = _digest(folder / name, deadline)
            if digest is None:
                return compared, bad
            if digest != expected:
                bad.append(f"{folder / name} has {digest[:19]}..., its manifest says {expected[:19]}...")
        compared += 1
    return compared, bad


def _train_and_validation(folder: Path) -> list[Shard]:
    manifest = read_manifest(folder)
    return [shard for split in manifest["splits"] for shard in split_shards(manifest, split)]


def _digest(path: Path, deadline: float) -> str | None:
    """None when the time is over before the file is."""
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(CHUNK_BYTES):
                if time.monotonic() > deadline:
                    return None
                digest.update(chunk)
    except OSError as error:
        return f"unreadable: {error.strerror}"
    return "sha256:" + digest.hexdigest()


def bytes_needed(num_params: int, optimizer: Optimizer, keep_last: int, already: int) -> int:
    """Free bytes that a run must find: `keep_last` checkpoints and the one being written, less those that are there.

    A checkpoint holds the fp32 master weights and the optimizer's states: two a parameter for Adam, one for momentum.
    """
    states = 2 if isinstance(optimizer, AdamW) else int(optimizer.momentum > 0)
    return max((keep_last + 1) * num_params * 4 * (1 + states) - already, 0)


def _bytes_saved(out_dir: Path) -> int:
    """What checkpoints in the folder take."""
    return sum(path.stat().st_size for path in (out_dir / "checkpoints").rglob("*") if path.is_file() and not path.is_symlink())
