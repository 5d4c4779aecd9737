"""Black boxes: what a run knew when something happened, kept in `events/`, whatever becomes of the run.

    events/step_00000123_diverged/
        event.json             the event, what was done about it, where the run was
        metrics_window.jsonl   the last 256 records, in the order they were made: steps that were later undone too
        tensor_stats.npz       the statistics of every parameter over the same steps, where the run keeps them
        sequences.json         for the steps around the onset: which sequences they read, and where these lie in the data

Written by rank 0 under a hidden name and renamed, so that what has a name is whole. An event that goes on is written again as
more is known. Nothing here ends a run: what cannot be written is said on stderr.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recipes.common.config.json_files import write_json
from recipes.common.run_dir.metrics import Note, Value, encode

WINDOW_STEPS = 256
MAX_BOXES = 64  # the oldest of those that called for nothing go first
MAX_SEQUENCE_STEPS = 8

Locate = Callable[[int], dict[str, Any]]  # a step -> the sequences it read, and where they lie


class BlackBox:
    """The last records of one run, and the folder to leave them in."""

    def __init__(self, out_dir: Path, locate: Locate, note: Note) -> None:
        """locate: what a step read. note: says a line to people."""
        self._events = out_dir / "events"
        self._out_dir, self._locate, self._note = out_dir, locate, note
        self._records: deque[Mapping[str, Value]] = deque(maxlen=WINDOW_STEPS)

    def remember(self, record: Mapping[str, Value]) -> None:
        self._records.append(record)

    def write(self, kind: str, onset_step: int, last_step: int, content: Mapping[str, Any]) -> Path | None:
        """Leave a box for the event that began at `onset_step`; `content` becomes event.json. None where it failed."""
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
        except Exception as error:  # a box is worth less than the run that it is about
            shutil.rmtree(hidden, ignore_errors=True)
            self._note(f"{folder} could not be written: {type(error).__name__}: {error}")
            return None
        return folder

    def _replace(self, hidden: Path, folder: Path, onset_step: int, last_step: int) -> None:
        """Under its name, in place of what was known of the event before; a later try of the same steps gets a new name."""
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
        """A slice of tensor_stats/, as plain arrays."""
        steps = [int(record["step"]) for record in self._records]
        if not steps or not (self._out_dir / "tensor_stats").is_dir():
            return
        from recipes.common.run_dir.tensor_stats import read_stats

        stats = read_stats(self._out_dir, min(steps), max(steps))
        arrays = {f"values/{name}": values for name, values in stats.values.items()}
        np.savez(folder / "tensor_stats.npz", steps=stats.steps, names=np.array(stats.names), **arrays)


def read_boxes(out_dir: Path) -> list[dict[str, Any]]:
    """event.json of every box of a run, by onset; "folder" is the box's name."""
    boxes = []
    for path in sorted((out_dir / "events").glob("step_*/event.json")):
        boxes.append(json.loads(path.read_text()) | {"folder": path.parent.name})
    return sorted(boxes, key=lambda box: (box["onset_step"], box["written_step"]))


def _was_undone(folder: Path) -> bool:
    """The steps of this box were left by a rewind: the same numbers later are other steps."""
    return json.loads((folder / "event.json").read_text()).get("reaction") is not None
