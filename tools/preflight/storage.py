"""Tests the output folder from every host, and compares the bytes of a few shards.

Saves need one file system under all hosts: rank 0 writes a random word, every host reads it and writes an answer, which rank 0
reads. Hosts write their test files at the same time, as in a save.
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

WRITE_BYTES = 8 << 30  # by all hosts together, each within the next two bounds; less where WRITE_SECONDS are over first
LEAST_BYTES, MOST_BYTES = 16 << 20, 256 << 20
WRITE_SECONDS = 3.0
CHUNK_BYTES = 4 << 20
FLUSH_BYTES = 32 << 20  # between two looks at the clock
SEEN_SECONDS = 10.0  # a network file system may show a new file late
SAMPLED_SHARDS = 4  # a host; fewer where the time is over first


def open_folder(out_dir: Path, nonce: str) -> dict[str, Any]:
    """Create out_dir/.preflight_NONCE with the word in it, on rank 0."""
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
    """Return whether this host sees rank 0's word, the free bytes, and how fast it writes a test file (bytes a second).

    Runs on a host's first rank. host: (index, number of hosts). Leaves `answer_HOST` for rank 0. Errors are returned as facts.
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
            os.listdir(path.parent.parent)  # listing makes a network file system refresh the folder
            if path.read_text() == word:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def _write_speed(path: Path, hosts: int) -> float:
    """Return bytes a second into a new file, which is removed, including the flush to disk."""
    size = min(max(WRITE_BYTES // hosts, LEAST_BYTES), MOST_BYTES)
    chunk = random.randbytes(CHUNK_BYTES)  # compressible or repeated bytes would look fast
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
    """Return {"unseen": hosts whose answer rank 0 cannot see, "saved_bytes": of checkpoints}, and remove the folder."""
    folder = out_dir / f".preflight_{nonce}"
    deadline = time.monotonic() + SEEN_SECONDS
    unseen = [host for host in hosts if not _see(folder / f"answer_{host}", nonce, deadline)]
    shutil.rmtree(folder, ignore_errors=True)
    return {"unseen": unseen, "saved_bytes": _bytes_saved(out_dir)}


def sample_shards(folders: Sequence[Path], host: tuple[int, int], seconds: float) -> tuple[int, list[str]]:
    """Return (number of shards compared, those with wrong checksums). host: (index, number of hosts): each samples others."""
    shards = [(folder, shard) for folder in folders for shard in _train_and_validation(folder)]
    random.Random(0).shuffle(shards)  # the same order on every host, which each starts elsewhere
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
                bad.append(f"{folder / name} has {digest[:19]}..., dataset.json says {expected[:19]}...")
        compared += 1
    return compared, bad


def _train_and_validation(folder: Path) -> list[Shard]:
    manifest = read_manifest(folder)
    return [shard for split in manifest["splits"] for shard in split_shards(manifest, split)]


def _digest(path: Path, deadline: float) -> str | None:
    """Return the sha256 of a file; None when time runs out."""
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
    """Return the free bytes that a run needs: `keep_last` checkpoints and the one being written, less the existing ones.

    A checkpoint holds the fp32 master weights and the optimizer's states: two a parameter for Adam, one for momentum.
    """
    states = 2 if isinstance(optimizer, AdamW) else int(optimizer.momentum > 0)
    return max((keep_last + 1) * num_params * 4 * (1 + states) - already, 0)


def _bytes_saved(out_dir: Path) -> int:
    """Return the bytes of the checkpoints in the folder."""
    return sum(path.stat().st_size for path in (out_dir / "checkpoints").rglob("*") if path.is_file() and not path.is_symlink())
