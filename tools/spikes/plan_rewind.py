"""`spikes plan-rewind RUN EVENT`: chooses the checkpoint to roll back to and the sequences to skip; prints cost and command.

The suspects are those that a run would choose by itself (`anomalies.rewinds`): the steps from just before the onset to the
peak. PaLM's team skipped 200 to 500 batches (arXiv 2204.02311, section 5.1): that is --skip-steps.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from recipes.common.anomalies.detector import scan
from recipes.common.anomalies.events import KINDS, Event
from recipes.common.anomalies.rewinds import suspect_steps
from recipes.common.config.json_files import laid_out, read_json
from recipes.common.data.order import kept_index
from recipes.common.run_dir.black_box import read_boxes
from recipes.common.run_dir.checkpoint_folders import checkpoint_step, sealed_checkpoints
from recipes.common.run_dir.metrics import METRICS, read_metrics
from tools.common.console import FAILED, GOOD, UsageError, printable
from tools.common.logs.log import COLUMNS
from tools.common.logs.names import float_or_nan
from tools.data.lookup import read_run
from tools.spikes.evidence.case import LOOK_AHEAD, LOOK_BACK, event_step

NEEDED = ("loss", "tokens", "seconds", "consumed_seqs")  # numbers of every step that was trained


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("event", metavar="EVENT", help="a step, or a black box of RUN/events")
    parser.add_argument("--margin-steps", type=int, help="skip this many steps before the onset too (default: 1)")
    parser.add_argument("--skip-steps", type=int, help="skip this many steps in all (default: up to the peak)")


def run(flags: argparse.Namespace) -> int:
    plan = plan_rewind(flags.run, flags.event, margin_steps=flags.margin_steps, skip_steps=flags.skip_steps)
    print(json.dumps(plan) if flags.json else printable(_report(plan)))
    return GOOD if plan["checkpoint"] else FAILED


def plan_rewind(folder: Path, event: str, *, margin_steps: int | None = None, skip_steps: int | None = None) -> dict[str, Any]:
    """Return the plan; "checkpoint" and "command" are None if no checkpoint is old enough. Raises UsageError for a bad event."""
    for flag, value in (("--margin-steps", margin_steps), ("--skip-steps", skip_steps)):
        if value is not None and value < 1:
            raise UsageError(f"{flag}={value}: must be 1 or more")
    if not (folder / METRICS).is_file():
        raise UsageError(f"{folder} is no run directory: it has no {METRICS}")
    records = _read_steps(folder)
    boxes = read_boxes(folder)
    step = event_step(folder, event, boxes)
    if step not in records:
        raise UsageError(f"EVENT {event}: metrics.jsonl has steps {min(records, default=0)} to {max(records, default=0)}")
    found = _event_at(records, step)
    first, last = suspect_steps(found) if found is not None else (max(step - 1, 1), step)
    if margin_steps is not None:
        first = max((found.onset_step if found is not None else step) - margin_steps, 1)
    if skip_steps is not None:
        last = first + skip_steps - 1
    newest, run_state = max(records), read_run(folder)
    since = run_state.order.since_step
    if first <= since:
        raise UsageError(
            f"{folder}: step {first} is from before step {since + 1}, since which another order is read: its sequences have no "
            "number in it to skip; resume from an earlier checkpoint without, or give a later event"
        )
    saved = [c for c in sealed_checkpoints(folder) if since <= checkpoint_step(c) < first]
    to_step = checkpoint_step(saved[-1]) if saved else None
    undone = [r for s, r in records.items() if to_step is not None and s > to_step]
    skip = _sequences(records, run_state.seq_len, run_state.skips, first, min(last, newest), last)
    return {
        "run": str(folder),
        "event": {"onset_step": step, "class": None} if found is None else {"onset_step": found.onset_step, "class": found.kind},
        "suspect_steps": [first, last],
        "skip": list(skip),
        "checkpoint": str(saved[-1]) if saved else None,
        "resume_step": to_step,
        "steps_repeated": len(undone),
        "tokens_repeated": int(sum(r["tokens"] for r in undone)),
        "seconds_repeated": float(sum(r["seconds"] for r in undone)),
        "sequences_skipped": skip[1] - skip[0],
        "step_seconds": float(median(r["seconds"] for r in records.values())),
        "command": _command(folder, to_step, skip) if saved else None,
    }


def _read_steps(folder: Path) -> dict[int, dict[str, Any]]:
    """Return step -> record. Raises UsageError for a record without the numbers that a plan is made of."""
    records = {r["step"]: r for r in read_metrics(folder) if "loss" in r}
    for step, record in records.items():
        for name in NEEDED:
            if type(record.get(name)) not in (int, float):
                value = json.dumps(record.get(name))[:40]
                raise UsageError(f"{folder / METRICS}: step {step} has {name}={value}: must be a number; delete its line")
    return records


def _event_at(records: dict[int, dict[str, Any]], step: int) -> Event | None:
    """Return the spike that holds the step, or begins next to it: one that a rewind cures before others.

    Slow steps, a plateau or a slow rise at the same time have no suspect sequences, and may have begun long before.
    """
    steps = np.array(sorted(records))
    columns = {name: np.array([float_or_nan(records[s].get(name)) for s in steps]) for name in COLUMNS}
    spikes = [e for e in scan(steps, columns) if KINDS[e.kind].is_spike]
    near = [e for e in spikes if e.onset_step - LOOK_AHEAD <= step <= max(e.peak_step, e.onset_step) + LOOK_BACK]
    return min(near, key=lambda e: (not KINDS[e.kind].cured_by_rewind, abs(e.onset_step - step)), default=None)


def _sequences(
    records: dict[int, dict[str, Any]],
    seq_len: int,
    skips: tuple[tuple[int, int], ...],
    first: int,
    logged: int,
    last: int,
) -> tuple[int, int]:
    """Return [start, stop) by index: what the steps first to last read, or would have read where the log ends before."""
    begin = records[first]["consumed_seqs"] - records[first]["tokens"] // seq_len
    end = records[logged]["consumed_seqs"] + (last - logged) * records[logged]["tokens"] // seq_len
    start, stop = kept_index(np.array([begin, end - 1]), skips).tolist()
    return start, stop + 1


def _command(folder: Path, step: int, skip: tuple[int, int]) -> str:
    """Return the command that resumes the run from the checkpoint without the sequences."""
    with laid_out(folder / "run.json"):
        words = read_json(folder / "run.json")["starts"][-1]["command"]
        recipe = next((word for word in words[1:] if word.endswith(".py") and Path(word).parent.name == "recipes"), "RECIPE")
    return f"bash launch/local.sh {recipe} --out-dir {folder} --resume-step {step} --skip {skip[0]}:{skip[1]}"


def _report(plan: dict[str, Any]) -> str:
    event, (first, last) = plan["event"], plan["suspect_steps"]
    kind = f" ({event['class']})" if event["class"] else ": the detectors find no spike there"
    lines = [
        f"event at step {event['onset_step']}{kind}",
        f"suspects: steps {first} to {last}, sequences {plan['skip'][0]}:{plan['skip'][1]} ({plan['sequences_skipped']})",
    ]
    if plan["checkpoint"] is None:
        lines.append(f"no checkpoint is from before step {first}: the run cannot roll back; start afresh, or continue")
        return "\n".join(lines)
    lines += [
        f"roll back to {plan['checkpoint']}",
        f"cost: {plan['steps_repeated']} steps, {plan['tokens_repeated']:,} tokens, {plan['seconds_repeated']:.0f} s computed "
        f"again ({plan['step_seconds']:.2f} s a step)",
        plan["command"],
    ]
    return "\n".join(lines)
