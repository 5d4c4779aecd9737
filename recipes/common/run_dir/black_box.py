"""Writes and reads black boxes: what a run had recorded when an event happened, kept in `events/` whatever becomes of the run.

    events/step_00000123_diverged/
        event.json             the event, the reaction, the run's position
        metrics_window.jsonl   the last 256 records, in the order they were made: steps that were later undone too
        tensor_stats.npz       the statistics of every parameter over the same steps, if the run records them
        sequences.json         for the steps around the onset: the sequences that they read, and where these lie in the data

Rank 0 writes a box under a hidden name and renames it, so that a box that has its name is whole. An event that lasts is written
again as more is known. Nothing here ends a run: what cannot be written is reported on stderr.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recipes.common.config.json_files import read_json, write_json
from recipes.common.run_dir.metrics import Note, Value, encode

WINDOW_STEPS = 256
MAX_BOXES = 64  # beyond, the oldest are deleted, those that are not actionable first
MAX_SEQUENCE_STEPS = 8

Locate = Callable[[int], dict[str, Any]]  # a step -> the sequences it read, and where they lie


class BlackBox:
    """Keeps the last records of one run, and writes them into boxes."""

    def __init__(self, out_dir: Path, locate: Locate, note: Note) -> None:
        """locate: returns what a step read. note: prints a line for people."""
        self._events = out_dir / "events"
        self._out_dir, self._locate, self._note = out_dir, locate, note
        self._records: deque[Mapping[str, Value]] = deque(maxlen=WINDOW_STEPS)

    def remember(self, record: Mapping[str, Value]) -> None:
        self._records.append(record)

    def write(self, kind: str, onset_step: int, last_step: int, content: Mapping[str, Any]) -> Path | None:
        """Write a box for the event that began at `onset_step`; `content` becomes event.json. Return None where it failed."""
        folder = self._events / f"step_{onset_step:08d}_{kind}"
        hidden = folder.with_name(f".{folder.name}")
        try:
            shutil.rmtree(hidden, ignore_errors=True)
            hidden.mkdir(parents=True)
            (hidden / "metrics_window.jsonl").write_bytes(b"".join(map(encode, self._records)))
            self._write_stats(hidden)
            first = max(onset_step - 2, 1)
            steps = range(first, min(last_step, first + MAX_SEQUENCE_STEPS - 1) + 1)
            write_json(hidden / "sequences.json", {"steps": {str(step): self._locate(step) for step in steps}})
            write_json(hidden / "event.json", dict(content))
            self._replace(hidden, folder, onset_step, last_step)
        except Exception as error:  # a box is worth less than its run
            shutil.rmtree(hidden, ignore_errors=True)
            self._note(f"writing {folder} failed: {type(error).__name__}: {error}")
            return None
        return folder

    def _replace(self, hidden: Path, folder: Path, onset_step: int, last_step: int) -> None:
        """Rename a box to its name, in place of an earlier one of the event; a later try of the same steps gets a new name."""
        number, target = 1, folder
        earlier = [path for path in self._events.glob(f"step_{onset_step:08d}_*") if not _was_undone(path)]
        while target.exists() and target not in earlier:
            number += 1
            target = folder.with_name(f"{folder.name}.{number}")
        for path in earlier:
            shutil.rmtree(path)
        os.replace(hidden, target)
        boxes = sorted(read_boxes(self._events.parent), key=lambda box: (box["actionable"], box["written_step"]))
        for box in boxes[:-MAX_BOXES]:
            shutil.rmtree(self._events / box["folder"])

    def _write_stats(self, folder: Path) -> None:
        """Write a slice of tensor_stats/, as plain arrays."""
        steps = [int(record["step"]) for record in self._records]
        if not steps or not (self._out_dir / "tensor_stats").is_dir():
            return
        from recipes.common.run_dir.tensor_stats import read_stats

        stats = read_stats(self._out_dir, min(steps), max(steps))
        arrays = {f"values/{name}": values for name, values in stats.values.items()}
        np.savez(folder / "tensor_stats.npz", steps=stats.steps, names=np.array(stats.names), **arrays)


def read_boxes(out_dir: Path) -> list[dict[str, Any]]:
    """Return event.json of every box of a run, by onset; "folder" is the box's name. Damaged ones are left out."""
    boxes = []
    for path in sorted((out_dir / "events").glob("step_*/event.json")):
        box = _read_event(path)
        if box is not None:
            boxes.append(box | {"folder": path.parent.name})
    return sorted(boxes, key=lambda box: (box["onset_step"], box["written_step"]))


def _was_undone(folder: Path) -> bool:
    """Whether a rewind undid the steps of this box: the same numbers later are other steps."""
    return (_read_event(folder / "event.json") or {}).get("reaction") is not None


def _read_event(path: Path) -> dict[str, Any] | None:
    """Return an event.json; None for a damaged one, which must not hide the others."""
    try:
        event = read_json(path)
    except (OSError, ValueError):
        return None
    steps = (event.get("onset_step"), event.get("written_step"))
    return event if all(type(step) is int for step in steps) and "actionable" in event else None
