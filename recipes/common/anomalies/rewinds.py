"""Says which events call for a rewind to a checkpoint, what it skips and changes, and keeps the history of rewinds.

Every rewind is an entry in run.json's `history`, which later starts read: they keep the skips and the lowered rate, and a
crash before the next save forgets nothing.
"""

from __future__ import annotations

import operator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from recipes.common.anomalies.events import KINDS, Event
from recipes.common.checkpoint.position import RunPosition
from recipes.common.config.json_files import JsonError, laid_out, read_json, write_json
from recipes.common.data.order import kept_index
from recipes.common.recipe import Reaction
from recipes.common.run_dir.checkpoint_folders import checkpoint_step, sealed_checkpoints
from recipes.common.run_dir.run_files import read_run

Skips = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Rewind:
    """One return to a checkpoint: an entry of the run's history."""

    kind: str  # of the event
    onset_step: int
    from_step: int  # the last step before going back
    to_step: int  # of the checkpoint
    skipped: tuple[int, int]  # sequences skipped from now on, by index (recipes.common.data.order.kept_index)
    lr_factor: float  # on the learning rate of the steps after to_step ...
    lr_until_step: int  # ... up to and including this one


def read_history(out_dir: Path) -> tuple[Rewind, ...]:
    """Return the rewinds of a run so far, in order. Raises JsonError for a damaged run.json."""
    path = out_dir / "run.json"
    entries = read_json(path).get("history", []) if path.is_file() else []
    with laid_out(path):
        return tuple(_rewind(entry) for entry in entries)


def history_at_start(out_dir: Path) -> tuple[Rewind, ...]:
    """Do the same for a start, which sets a damaged run.json aside, says so, and goes on without its history."""
    try:
        return read_history(out_dir) if read_run(out_dir) is not None else ()
    except JsonError:
        return ()


def _rewind(entry: dict[str, Any]) -> Rewind:
    """Return a rewind from its record in run.json; later versions may record more."""
    first, last = entry["skipped"]
    steps = {name: operator.index(entry[name]) for name in ("onset_step", "from_step", "to_step", "lr_until_step")}
    skipped = (operator.index(first), operator.index(last))
    return Rewind(kind=str(entry["kind"]), skipped=skipped, lr_factor=float(entry["lr_factor"]), **steps)


def append_history(out_dir: Path, rewind: Rewind, skips: Skips) -> None:
    """Record a rewind, on rank 0. The present start reads `skips` from now on: tools look there for what a step read."""
    run = read_run(out_dir)
    if run is None:  # damaged while the run goes on: the next start says so
        return
    entry = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "action": "rewind", **asdict(rewind)}
    run["history"] = [*run.get("history", []), entry]
    run["starts"][-1]["skips"] = [list(skip) for skip in skips]
    write_json(out_dir / "run.json", run)


def skips_ahead(history: tuple[Rewind, ...], position: RunPosition) -> Skips:
    """Return the skips of the history that a checkpoint from before them does not hold yet, of the present order's sequences."""
    here = position.next_index()
    return tuple(r.skipped for r in history if r.skipped[0] >= here and r.to_step >= position.order.since_step)


def lr_factors(history: tuple[Rewind, ...]) -> list[tuple[int, int, float]]:
    """Return (after step, up to step, factor) of every stretch of the history whose learning rate is another."""
    return [(each.to_step, each.lr_until_step, each.lr_factor) for each in history if each.lr_factor != 1.0]


def lr_factor_at(history: tuple[Rewind, ...], step: int) -> float:
    """Return the factor on the schedule's learning rate at `step`: the product of the stretches that hold it."""
    factor = 1.0
    for rewind in history:
        if rewind.to_step < step <= rewind.lr_until_step:
            factor *= rewind.lr_factor
    return factor


def calls_for_rewind(reaction: Reaction, event: Event, history: tuple[Rewind, ...]) -> bool:
    """Whether the recipe has a rewind tried for an event.

    Finished events need no rewind. A bump after a resume needs one only if it follows our own, unsuccessful rewind.
    """
    in_vain = event.kind == "resume_artefact" and bool(tries_at(history, event.onset_step))
    curable = KINDS[event.kind].cured_by_rewind or in_vain
    return reaction.action == "rewind" and event.actionable and event.end_step is None and curable


def suspect_steps(event: Event, last_step: int = 0, tries: int = 0) -> tuple[int, int]:
    """Return (first, last) of the steps whose sequences may have caused `event`.

    The loss of a step is that of the weights before its update: what shows at the onset may be the update one step earlier.
    last_step: the newest, of an event that lasts: each step so far may belong to it. tries: rewinds that did not help; each
    doubles the stretch forward, as a bad document may be longer than what was read of it.
    """
    first, last = max(event.onset_step - 1, 1), max(event.peak_step, event.onset_step, last_step)
    return first, last + (last - first + 1) * (2**tries - 1)


def tries_at(history: tuple[Rewind, ...], onset_step: int) -> tuple[Rewind, ...]:
    """Return the last rewinds, those that did not get the run past the step where it now went wrong."""
    tries: list[Rewind] = []
    for rewind in reversed(history):
        if rewind.from_step < onset_step:
            break
        tries.insert(0, rewind)
    return tuple(tries)


def indices_of(consumed: tuple[int, int], skips: Skips) -> tuple[int, int]:
    """Return [start, stop) by index: the sequences from the first of two counts of consumed ones to the second."""
    start, end = kept_index(np.array([consumed[0], consumed[1] - 1]), skips).tolist()
    return start, end + 1


def checkpoint_before(out_dir: Path, step: int, tries: int, since_step: int = 0) -> int | None:
    """Return the step of the newest checkpoint before `step`, one further back for each try that failed.

    since_step: none from before it, when the order of the data changed: the sequences to skip are no longer those.
    """
    steps = [at for folder in sealed_checkpoints(out_dir) if since_step <= (at := checkpoint_step(folder)) < step]
    return steps[max(len(steps) - 1 - tries, 0)] if steps else None


def history_fields(history: tuple[Rewind, ...], step: int) -> dict[str, float]:
    """Return the fields for metrics.jsonl, from the first rewind on."""
    if not history:
        return {}
    fields = {"rewinds": len(history), "rewound_from_step": history[-1].from_step}
    factor = lr_factor_at(history, step)
    return fields | ({"lr_factor": factor} if factor != 1.0 else {})


def describe_rewind(rewind: Rewind) -> str:
    start, stop = rewind.skipped
    rate = f", learning rate x {rewind.lr_factor:g} up to step {rewind.lr_until_step}" if rewind.lr_factor != 1.0 else ""
    return (
        f"{rewind.kind} from step {rewind.onset_step}: from step {rewind.from_step} back to {rewind.to_step}, sequences "
        f"{start}:{stop} skipped{rate}"
    )
