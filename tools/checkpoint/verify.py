"""Reads every byte of a checkpoint, or of all of a run's, and compares it with the recorded checksums; exit 1 if damaged."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from recipes.common.checkpoint.files import CheckpointError, unsealed
from recipes.common.checkpoint.reader import Reader
from tools.checkpoint.contents import checkpoint_folders, damaged_files, gaps, open_checkpoint
from tools.common.console import FAILED, GOOD, UsageError


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="CHECKPOINT|RUN", help="a checkpoint, or a run directory: all it has")


def run(args: argparse.Namespace) -> int:
    path = args.path
    is_run = (path / "checkpoints").is_dir()
    folders = (
        [f for f in checkpoint_folders(path) if not f.name.startswith(".") and f.name != "abandoned"]
        if is_run
        else [open_checkpoint(path)]
    )
    if not folders:
        raise UsageError(f"{path}: no checkpoints to verify")
    results = {str(folder): _verify_one(folder) for folder in folders}
    if args.json:
        print(json.dumps({"good": not any(results.values()), "checkpoints": results}))
    else:
        for folder, wrong in results.items():
            print(f"{folder}: {'intact' if not wrong else 'DAMAGED'}")
            for line in wrong:
                print(f"  {line}")
    return FAILED if any(results.values()) else GOOD


def _verify_one(folder: Path) -> list[str]:
    try:
        wrong = damaged_files(folder)
        wrong += [
            f"{folder / name}: the seal does not name it; no resume reads it, move it elsewhere" for name in unsealed(folder)
        ]
        return wrong or gaps(Reader(folder))
    except CheckpointError as error:
        return [str(error)]
