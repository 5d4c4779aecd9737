"""Judges what a job left in its folder: the last state, every sealed checkpoint, and what is nobody's to delete."""

from __future__ import annotations

import contextlib
import json
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import xxhash

from recipes.common.checkpoint.files import damage
from recipes.common.run_dir.checkpoint_folders import SEAL
from tests.bench.faults.jobs import STEPS

Content = dict[str, str]  # file, or "state" -> its checksum
Curve = Mapping[int, Content]  # step -> of an undisturbed run
_STATE = ("step", "consumed_seqs", "skipped_steps", "optimizer_steps", "skips", "seed", "world_size")


def sealed(run_dir: Path) -> dict[int, Path]:
    """Return step -> the checkpoint that has its final name and a seal."""
    folders = (run_dir / "checkpoints").glob("step_*") if (run_dir / "checkpoints").is_dir() else ()
    found = {int(f.name[5:]): f for f in folders if re.fullmatch(r"step_\d{8}", f.name) and (f / SEAL).is_file()}
    return dict(sorted(found.items()))


def contents(folder: Path) -> tuple[Content, set[str]]:
    """Return (checksums of what was trained, by file; what the rank files say of who wrote them)."""
    found, writers = {}, set()
    for path in sorted(folder.glob("rank_*.safetensors")):
        raw = path.read_bytes()
        size = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + size])
        writers.add(json.dumps(header.pop("__metadata__", {}), sort_keys=True))
        found[path.name] = xxhash.xxh3_128(json.dumps(header, sort_keys=True).encode() + raw[8 + size :]).hexdigest()
    state = json.loads((folder / "state.json").read_text())
    found["state"] = json.dumps([state[name] for name in _STATE])
    return found, writers


def curve(run_dir: Path) -> dict[int, Content]:
    return {step: contents(folder)[0] for step, folder in sealed(run_dir).items()}


def sealed_problems(run_dir: Path, curves: Sequence[Curve], harmed: Mapping[Path, tuple[int, int]]) -> list[str]:
    """Return what is wrong with sealed checkpoints: each must verify, be of one attempt, and be that step of one of the curves.

    harmed: files that the bench damaged, as `identity` gave them; a checkpoint that still holds one is left out.
    """
    found = []
    for step, folder in sealed(run_dir).items():
        if any(path.is_relative_to(folder) and identity(path) == was for path, was in harmed.items()):
            continue
        wrong = damage(folder)
        if wrong:
            found.append(f"sealed, but damaged: {wrong[0]}")
            continue
        content, writers = contents(folder)
        if len(writers) > 1:
            found.append(f"{folder}: of two attempts: {sorted(writers)}")
        if content not in [each.get(step) for each in curves]:
            files = sorted(name for name in content if content[name] not in [each.get(step, {}).get(name) for each in curves])
            found.append(f"{folder}: not the state of an undisturbed run ({files or 'of two jobs'})")
    return found


def last_problems(run_dir: Path, curves: Sequence[Curve]) -> list[str]:
    """Return what is wrong with exit 0: the last step must be on disk, as an undisturbed run leaves it."""
    newest = max(sealed(run_dir), default=0)
    if newest != STEPS:
        return [f"exit 0, but the newest checkpoint is of step {newest} of {STEPS}"]
    folder = sealed(run_dir)[STEPS]
    if wrong := damage(folder):
        return [f"exit 0, but the last checkpoint is damaged: {wrong[0]}"]
    if contents(folder)[0] not in [each[STEPS] for each in curves]:
        return ["exit 0, but the last state is not that of an undisturbed run"]
    return []


def stop_problems(run_dir: Path, output: str) -> list[str]:
    """Return what is wrong with exit 75 after one request to stop: every step is on disk, or it is said that it is not."""
    steps = [0]
    with contextlib.suppress(OSError):
        for line in (run_dir / "metrics.jsonl").read_bytes().splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                steps.append(json.loads(line)["step"])
    newest = max(sealed(run_dir), default=0)
    if newest < max(steps) and "before it had saved" not in output and "before the first step" not in output:
        return [f"exit 75, but the newest checkpoint is of step {newest}, and step {max(steps)} was trained"]
    return []


def identity(path: Path) -> tuple[int, int]:
    """Return what tells a file from one written later in its place; (0, 0) where it is gone."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_ino, status.st_mtime_ns
