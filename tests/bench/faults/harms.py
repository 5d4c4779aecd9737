"""Damages the files that a stopped run left, and puts things in its way."""

from __future__ import annotations

import shutil
from pathlib import Path

from recipes.common.run_dir.checkpoint_folders import SEAL
from tests.bench.faults.judge import identity, sealed
from tests.bench.faults.plans import HARMS, Harm

KEPT = "checkpoints/.best/kept.txt"  # a file that only its owner may delete


def do_harm(harm: Harm, run_dir: Path) -> dict[Path, tuple[int, int]]:
    """Do it where it is possible. Returns the damaged files of checkpoints, with their identities since."""
    if harm.what not in HARMS:
        _put_in_the_way(harm.what, run_dir)
        return {}
    path = _path(harm, run_dir)
    if path is None or not (path.is_file() or path.is_symlink()):
        return {}
    if path.name == "latest":
        path.unlink()
        if harm.what != "remove":
            path.symlink_to("step_00009999")
        return {}
    _damage(harm, path)
    return {path: identity(path)} if "checkpoints" in path.parts else {}


def _path(harm: Harm, run_dir: Path) -> Path | None:
    """Return the file; None where the run would be lost with it, which is nobody's fault."""
    found = sealed(run_dir)
    newest = list(found.values())[-1] if len(found) > 1 else None
    in_checkpoint = {"checksums": SEAL, "index": "index.json", "state": "state.json"}
    if harm.file in in_checkpoint or harm.file == "rank file":
        if newest is None:
            return None
        files = sorted(newest.glob("rank_*")) if harm.file == "rank file" else [newest / in_checkpoint[harm.file]]
        return files[int(harm.at * 1000) % len(files)]
    names = {"latest": "checkpoints/latest", "metrics": "metrics.jsonl", "attempts": "logs/attempts.jsonl"}
    names["heartbeat"] = "logs/heartbeat/rank_00000.json"
    return run_dir / names.get(harm.file, harm.file)


def _damage(harm: Harm, path: Path) -> None:
    raw = bytearray(path.read_bytes())
    at = min(int(harm.at * len(raw)), len(raw) - 1)
    if harm.what == "remove":
        path.unlink()
        return
    if harm.what == "flip" and raw:
        raw[at] ^= 1 << int(harm.at * 8e6) % 8
    elif harm.what == "cut":
        del raw[at:]
    elif harm.what == "zero":  # as a file system does after a power cut
        raw[at : at + 4096] = bytes(len(raw[at : at + 4096]))
    elif harm.what == "empty":
        raw.clear()
    path.write_bytes(raw)


def _put_in_the_way(what: str, run_dir: Path) -> None:
    checkpoints, found = run_dir / "checkpoints", sealed(run_dir)
    if not found:
        return
    step, newest = list(found.items())[-1]
    if what == "copy":
        shutil.copytree(newest, checkpoints / f"{newest.name}.bak")
    elif what == "best":
        (run_dir / KEPT).parent.mkdir(exist_ok=True)
        (run_dir / KEPT).write_text("mine")
    elif what == "empty step":
        (checkpoints / f"step_{step + 1:08d}").mkdir(exist_ok=True)
    elif what == "file":
        (checkpoints / f"step_{step + 2:08d}").write_text("")
    elif what == "saving":  # what a killed save leaves, with the reports of two of its ranks
        hidden = checkpoints / f".step_{step + 4:08d}.saving"
        hidden.mkdir(exist_ok=True)
        for path in newest.glob("rank_*"):
            shutil.copyfile(path, hidden / path.name)
            (hidden / f".{path.stem}.json").write_text("{}")
