"""Collects the text of a report: the events of a run or a log, what was done about them, and the figures at the top."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recipes.common.anomalies.events import Event
from recipes.common.anomalies.rewinds import Rewind, describe_rewind
from recipes.common.config.json_files import laid_out, read_json
from recipes.common.run_dir.black_box import read_boxes
from tools.common.logs.run_numbers import Table, is_run

LAST_STEPS = 20  # the figure of the training loss is their mean
SAME_STEPS = 2  # an event seen live and one seen in the whole log are the same if their onsets differ by no more


def list_events(source: Path, seen: Sequence[Event]) -> list[dict[str, Any]]:
    """Return the events by onset: those detected in the log as it stands, and those of undone steps from their black boxes."""
    boxes = read_boxes(source) if is_run(source) else []
    undone = [box for box in boxes if box.get("reaction") is not None]
    events = []
    for box in undone:
        with laid_out(source / "events" / box["folder"] / "event.json"):
            events.append(_from_box(box))
    for event in seen:
        box = next((b for b in boxes if b not in undone and abs(b["onset_step"] - event.onset_step) <= SAME_STEPS), None)
        events.append(_from_event(event, box))
    return sorted(events, key=lambda event: (event["onset"], event["peak"]))


def _from_event(event: Event, box: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "class": event.kind,
        "onset": event.onset_step,
        "peak": event.peak_step,
        "end": event.end_step,
        "delta": round(event.delta, 4) if np.isfinite(event.delta) else None,
        "first_signal": event.first_signal,
        "lead": event.lead_steps,
        "actionable": event.actionable,
        "done": "" if box is None else (box.get("hopeless") or "logged, with a black box"),
        "box": None if box is None else box["folder"],
    }


def _from_box(box: dict[str, Any]) -> dict[str, Any]:
    rewind = Rewind(**{**box["reaction"], "skipped": tuple(box["reaction"]["skipped"])})
    delta = box["delta"]
    return {
        "class": box["class"],
        "onset": box["onset_step"],
        "peak": box["peak_step"],
        "end": rewind.from_step,
        "delta": round(delta, 4) if isinstance(delta, float) else None,
        "first_signal": box["first_signal"],
        "lead": box["lead_steps"],
        "actionable": box["actionable"],
        "done": "rewound " + describe_rewind(rewind).partition(": ")[2],
        "box": box["folder"],
    }


def hint(events: list[dict[str, Any]]) -> str:
    if not events:
        return "No events were detected."
    return (
        "Click an event to zoom in on it. Red: calls for action. "
        "Rise: loss at the peak above the loss expected there. Lead: steps from the first signal to the peak."
    )


def figures(table: Table, events: list[dict[str, Any]], rewinds: int) -> list[tuple[str, str]]:
    """Return (figure, what it is) for the top of the page."""
    loss = table["loss"][np.isfinite(table["loss"])]
    shown = [(f"{int(table['step'].max()):,}", "steps")]
    if "consumed_tokens" in table:
        shown.append((_large(np.nanmax(table["consumed_tokens"])), "tokens"))
    if loss.size:
        shown.append((f"{loss[-LAST_STEPS:].mean():.4f}", f"training loss, mean of the last {min(LAST_STEPS, loss.size)} steps"))
    if "val_loss" in table and np.isfinite(table["val_loss"]).any():
        shown.append((f"{table['val_loss'][np.isfinite(table['val_loss'])][-1]:.4f}", "last validation loss"))
    urgent = sum(event["actionable"] for event in events)
    shown.append((f"{urgent} of {len(events)}", "events call for action"))
    if rewinds:
        shown.append((str(rewinds), "rewinds" if rewinds > 1 else "rewind"))
    return shown


def describe_source(source: Path) -> str:
    """Return one line on what was trained, from the run's own files, or the path of what has none."""
    files = source / "recipe.json", source / "run.json"
    if not all(file.is_file() for file in files):
        return str(source)
    recipe, manifest = map(read_json, files)
    with laid_out(source):
        start = manifest["starts"][-1]
        sizes, batch = start["sizes"], recipe["batch"]
        return (
            f"{recipe['name']}: {recipe['model']['class'].removesuffix('Config')}, {recipe['num_params']:,} parameters · tensor "
            f"{sizes['tensor']} x pipeline {sizes['pipeline']} x data {sizes['data']} · {batch['global_seqs']} sequences of "
            f"{batch['seq_len']} a step · started {start['time'].replace('T', ' ').removesuffix('+00:00')} UTC"
        )


def _large(count: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"
