"""`goodput RUN`: how much of the time since a run's first start trained steps that were kept, and what took the rest, by cause.

Reads logs/attempts.jsonl, written by the launch scripts' supervisor, and the heartbeats of an attempt that still runs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from recipes.common.run_dir.attempts import FILE, beats_of_newest, read_attempts
from recipes.common.run_dir.heartbeat import Beat
from tools.common.console import GOOD, UsageError, table

RUNNING = "running"


@dataclass
class EndCost:
    """The cost of all ends with one cause, in seconds of wall time."""

    ends: int = 0
    lost_steps: int = 0  # trained, but not saved before the end
    lost_seconds: float = 0.0
    noticing_seconds: float = 0.0  # from the last sign of progress to the end of every process
    down_seconds: float = 0.0  # from there to the next start: backoff, a queue, preflight
    restarting_seconds: float = 0.0  # from that start to its first step

    @property
    def seconds(self) -> float:
        return self.lost_seconds + self.noticing_seconds + self.down_seconds + self.restarting_seconds


@dataclass
class Goodput:
    """A run's time in seconds of wall time; the parts and the causes sum to `wall_seconds`."""

    wall_seconds: float = 0.0
    training_seconds: float = 0.0  # steps that were kept
    data_seconds: float = 0.0  # waiting for a batch
    evaluating_seconds: float = 0.0
    saving_seconds: float = 0.0  # blocking training; the rest of a save is asynchronous
    first_start_seconds: float = 0.0  # from the first start to its first step
    finishing_seconds: float = 0.0  # after the last step
    last_step: int = 0
    causes: dict[str, EndCost] = field(default_factory=dict)

    @property
    def share(self) -> float:
        return self.training_seconds / self.wall_seconds if self.wall_seconds else 0.0


def goodput(records: Sequence[Mapping[str, Any]], beats: Sequence[Beat] = (), now: float = 0.0) -> Goodput:
    """Account for the time of attempts.jsonl's `records`. beats: of an attempt without an end yet; now: Unix seconds."""
    starts = [record for record in records if record["event"] == "start"]
    ends = {record["attempt"]: record for record in records if record["event"] == "end"}
    result = Goodput()
    for index, start in enumerate(starts):
        end = ends.get(start["attempt"]) or _unended(start, beats, now)
        phases = dict.fromkeys(("start", "data", "step", "log", "evaluate", "save", "end"), 0.0) | end["phase_seconds"]
        loop = sum(phases.values()) - phases["start"]
        last_beat = min(max(end["last_beat"], start["time"] + loop), end["time"])
        starting = last_beat - loop - start["time"]  # the launcher, imports, weights, a checkpoint read
        lost = min(end["lost_seconds"], phases["step"])
        before = starts[index - 1] if index else None
        if before is None:
            result.first_start_seconds += starting
        else:
            result.causes[ends[before["attempt"]]["cause"]].restarting_seconds += starting
        result.training_seconds += phases["step"] + phases["log"] - lost
        result.data_seconds += phases["data"]
        result.evaluating_seconds += phases["evaluate"]
        result.saving_seconds += phases["save"]
        result.finishing_seconds += phases["end"]
        result.last_step = max(end["last_step"] - end["lost_steps"], result.last_step)
        follows = starts[index + 1]["time"] if index + 1 < len(starts) else end["time"]
        if end["cause"] in ("finished", RUNNING) and index + 1 == len(starts):
            result.finishing_seconds += end["time"] - last_beat
        else:
            cause = result.causes.setdefault(end["cause"], EndCost())
            cause.ends += 1
            cause.lost_steps += end["lost_steps"]
            cause.lost_seconds += lost
            cause.noticing_seconds += end["time"] - last_beat
            cause.down_seconds += follows - end["time"]
        result.wall_seconds = max(end["time"], follows) - starts[0]["time"]
    return result


def _unended(start: Mapping[str, Any], beats: Sequence[Beat], now: float) -> dict[str, Any]:
    """Return the end, as of now, of an attempt that still runs."""
    first = min(beats, key=lambda beat: beat.rank, default=None)
    last = first.time if first else start["time"]
    phases = dict(first.phase_seconds) if first else {}
    return {
        "time": max(now, last),
        "cause": RUNNING,
        "last_beat": last,
        "phase_seconds": phases,
        "lost_steps": 0,
        "lost_seconds": 0.0,
        "last_step": first.step if first else start["resumed_step"],
    }


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="a run directory")


def run(flags: argparse.Namespace) -> int:
    records = read_attempts(flags.run_dir)
    starts = [record for record in records if record["event"] == "start"]
    if not starts:
        raise UsageError(f"{flags.run_dir / FILE} has no start; only runs started by launch/*.sh (tools/supervise) write it")
    beats = beats_of_newest(flags.run_dir)
    result = goodput(records, beats, time.time())
    if flags.json:
        causes = {name: asdict(cause) | {"seconds": cause.seconds} for name, cause in result.causes.items()}
        print(json.dumps(asdict(result) | {"goodput": result.share, "causes": causes}))
    else:
        print(describe(result))
    return GOOD


def describe(result: Goodput) -> str:
    def row(what: str, seconds: float) -> list[object]:
        return [what, f"{seconds:.1f}", f"{100 * seconds / max(result.wall_seconds, 1e-9):.1f} %"]

    rows = [
        row("training, kept", result.training_seconds),
        row("waiting for data", result.data_seconds),
        row("evaluating", result.evaluating_seconds),
        row("saving, blocking", result.saving_seconds),
        row("the first start", result.first_start_seconds),
        row("finishing", result.finishing_seconds),
        *(row(f"after {name}", cause.seconds) for name, cause in result.causes.items()),
        row("all", result.wall_seconds),
    ]
    text = f"goodput {100 * result.share:.1f} %, step {result.last_step}\n\n" + table(rows, ["where", "seconds", "share"])
    if result.causes:
        lost = [
            [name, cause.ends, cause.lost_steps, *(f"{s:.1f}" for s in
             (cause.lost_seconds, cause.noticing_seconds, cause.down_seconds, cause.restarting_seconds))]
            for name, cause in result.causes.items()
        ]  # fmt: skip
        text += "\n\n" + table(lost, ["cause", "ends", "lost steps", "lost s", "noticing s", "down s", "restarting s"])
    return text
