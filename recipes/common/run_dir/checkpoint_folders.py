"""Names the checkpoints of a run directory: `checkpoints/step_00001000/`, with a seal in each that is whole."""

from __future__ import annotations

import re
from pathlib import Path

SEAL = "checksums.json"  # written last (recipes.common.checkpoint.files)
_NAME = re.compile(r"step_(\d{8,})")


def step_folder(out_dir: Path, step: int) -> Path:
    return out_dir / "checkpoints" / f"step_{step:08d}"


def checkpoint_step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def sealed_checkpoints(out_dir: Path) -> list[Path]:
    """Return the checkpoints that have their final name, which they get once they are sealed; oldest first."""
    return sealed_folders(out_dir / "checkpoints")


def newest_before(out_dir: Path, step: int) -> Path | None:
    """Return the newest sealed checkpoint of a step before `step`."""
    return max((c for c in sealed_checkpoints(out_dir) if checkpoint_step(c) < step), key=checkpoint_step, default=None)


def sealed_folders(where: Path) -> list[Path]:
    """Return the folders in `where` that are named as checkpoints, by step. A user's copy, step_00001000.bak, is none."""
    found = [path for path in where.glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted((path for path in found if path.name == f"step_{checkpoint_step(path):08d}"), key=checkpoint_step)


def holder(path: Path) -> Path | None:
    """Return the checkpoint, or the folder of a run's checkpoints, in which `path` lies; None if it lies in neither."""
    return next((folder for folder in path.resolve().parents if _keeps_checkpoints(folder)), None)


def _keeps_checkpoints(folder: Path) -> bool:
    is_one = (folder / SEAL).is_file() and (folder / "state.json").is_file()
    return is_one or (folder.name == "checkpoints" and bool(sealed_folders(folder)))
