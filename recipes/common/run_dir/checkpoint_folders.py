"""Names the checkpoints of a run directory: `checkpoints/step_00001000/`, with a seal in each that is whole."""

from __future__ import annotations

from pathlib import Path

SEAL = "checksums.json"  # written last (recipes.common.checkpoint.files)


def step_folder(out_dir: Path, step: int) -> Path:
    return out_dir / "checkpoints" / f"step_{step:08d}"


def checkpoint_step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def sealed_checkpoints(out_dir: Path) -> list[Path]:
    """Return the checkpoints that have their final name, which they get once they are sealed; oldest first."""
    return sorted((out_dir / "checkpoints").glob("step_[0-9]*"))
