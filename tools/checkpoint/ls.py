"""Lists the checkpoints of a run, by their checksum files alone; `verify` reads the rest."""

from __future__ import annotations

import argparse
import json
from datetime import datetime
from pathlib import Path
from typing import Any

from recipes.common.checkpoint.files import CheckpointError
from recipes.common.checkpoint.reader import Reader
from recipes.common.run_dir.checkpoint_folders import SEAL
from tools.checkpoint.contents import checkpoint_folders, missized_files
from tools.common.console import GOOD, human_bytes, table


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")


def run(args: argparse.Namespace) -> int:
    found = [_describe(folder) for folder in checkpoint_folders(args.run)]
    latest = args.run / "checkpoints" / "latest"
    target = latest.resolve().name if latest.exists() else None
    for entry in found:
        entry["latest"] = entry["name"] == target
    if args.json:
        print(json.dumps({"run": str(args.run), "checkpoints": found}))
        return GOOD
    rows = [
        [e["name"], e["state"], human_bytes(e["bytes"]), e["sealed_at"] or "", e["ranks"] or "", "latest" if e["latest"] else ""]
        for e in found
    ]
    print(table(rows, ["checkpoint", "state", "size", "sealed at", "ranks", ""]) if rows else f"{args.run}: no checkpoints")
    return GOOD


def _describe(folder: Path) -> dict[str, Any]:
    """Return state, size and time of one checkpoint folder."""
    entry: dict[str, Any] = {"name": folder.name, "state": "sealed", "ranks": None, "step": None, "sealed_at": None}
    entry["bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    try:
        wrong = missized_files(folder)
    except CheckpointError:
        entry["state"] = "being written, or left by a kill" if folder.name.startswith(".") else "not sealed: never loaded"
        return entry
    if wrong:
        entry["state"] = f"damaged: {len(wrong)} files of another size"
        return entry
    reader = Reader(folder)
    entry |= {"ranks": reader.state["world_size"], "step": reader.state["step"]}
    entry["sealed_at"] = datetime.fromtimestamp((folder / SEAL).stat().st_mtime).isoformat(" ", "seconds")
    return entry
