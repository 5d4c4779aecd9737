"""Scores the detectors on real logs.

The folder holds labels.csv (columns set, file, onset_step, peak_step, delta_loss, duration_steps) and logs:

    megatron_golden_history/    NVIDIA's release tests; mixtral* hold real spikes, the others are healthy
    llmc/                       healthy, with gradient norms
    polypythias/                14m* and 70m* rise slowly, 410m* and 160m* are healthy
    modded_nanogpt/             hard batches; *ValueEmbed* runs read the same data
    bloom/                      log lines around BLOOM's spike

The labels are automatic and use medians, as the detectors do. So jumps that need no statistics are counted too: a loss that is
half a nat above each of the JUMP_POINTS before it.
"""

from __future__ import annotations

import csv
import itertools
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from recipes.common.anomalies.detector import scan
from recipes.common.anomalies.events import KINDS, Event
from tests.bench.spikes.scores import Score, share
from tools.common.console import UsageError
from tools.common.logs.log import Log
from tools.common.logs.reader import read_logs
from tools.spikes.compare import coincident
from tools.spikes.scan import Scanned, scan_files

ALARMS_PER_1000, RISE_NATS = 0.02, 0.15
SPEED_POINTS, SPEED_SECONDS = 3_500_000, 30.0  # the goal of `speed`
JUMP_POINTS, JUMP_NATS, SETTLED_POINTS = 20, 0.5, 128
BLOOM_ONSET, BLOOM_PEAK = 31215, 31219


def score_detection(folder: Path) -> list[Score]:
    """Score every goal that logs can answer; a kind of log that is absent from the folder gives no score."""
    files = _logs_in(folder)
    found = {str(scanned.file): scanned for scanned in scan_files(files)}
    with (folder / "labels.csv").open() as file:
        labels = [row | {"file": str(folder / row["file"])} for row in csv.DictReader(file)]
    chosen = {name: [found[str(path)] for path in files if pattern(path)] for name, pattern in GROUPS.items()}
    scores = [
        *_mixtral([row for row in labels if "mixtral" in row["file"].lower()], found, chosen["mixtral"]),
        _bloom(chosen["bloom"]),
        *_healthy(chosen["healthy"]),
        *_outliers([row for row in labels if "mixtral" not in row["file"].lower()], found),
        _rises("slow rises in 14m logs before +0.15 nat", chosen["14m"], 1.0),
        _rises("slow rises in 70m logs before +0.15 nat", chosen["70m"], 0.8),
        _silence(chosen["410m"]),
        _pairs(chosen["value_embed"]),
        *_one_nan(chosen["llmc"]),
    ]
    return [score for score in scores if score is not None]


GROUPS = {
    "mixtral": lambda path: "mixtral" in path.name.lower(),
    "bloom": lambda path: path.parent.name == "bloom",
    "healthy": lambda path: (
        (path.parent.name == "megatron_golden_history" and "mixtral" not in path.name.lower())
        or path.parent.name == "llmc"
        or (path.parent.name == "polypythias" and path.name.startswith(("410m", "160m")))
    ),
    "14m": lambda path: path.name.startswith("14m"),
    "70m": lambda path: path.name.startswith("70m"),
    "410m": lambda path: path.name.startswith("410m"),
    "value_embed": lambda path: "ValueEmbed" in path.name,
    "llmc": lambda path: path.parent.name == "llmc",
}


def _mixtral(labels: list[dict[str, str]], found: dict[str, Scanned], logs: list[Scanned]) -> list[Score]:
    """Count labelled spikes with an event that begins at their very sample, and jumps that anybody sees."""
    if not logs:
        return []

    def seen(row: dict[str, str]) -> bool:
        return any(e.onset_step == int(row["onset_step"]) and e.delta > 0 for e in found[row["file"]].events)

    scores = []
    for nats, goal in ((0.5, 1.0), (0.3, 0.95)):
        large = [row for row in labels if float(row["delta_loss"]) >= nats]
        missed = ", ".join(row["onset_step"] for row in large if not seen(row))
        text = f"Mixtral spikes of {nats} nat or more, at their sample"
        scores.append(share(text, sum(map(seen, large)), len(large), goal, f"not {missed}" if missed else ""))
    jumps = [(log.file, step) for log in logs for step in _jumps(read_logs(Path(log.file))[0])]
    inside = [any(e.onset_step <= step <= e.end_step for e in found[file].events) for file, step in jumps]
    return [*scores, share(f"Mixtral jumps of {JUMP_NATS} nat over {JUMP_POINTS} points", sum(inside), len(inside), 1.0)]


def _jumps(log: Log) -> list[int]:
    losses = log.columns["loss"]
    before = np.lib.stride_tricks.sliding_window_view(losses, JUMP_POINTS)[:-1].max(axis=1)
    at = np.flatnonzero(losses[JUMP_POINTS:] >= before + JUMP_NATS) + JUMP_POINTS
    return log.steps[at[at >= SETTLED_POINTS]].tolist()


def _bloom(logs: list[Scanned]) -> Score | None:
    if not logs:
        return None
    spikes = [e for log in logs for e in log.events if e.peak_step == BLOOM_PEAK]
    text = ", ".join(f"step {e.onset_step}, {e.lead_steps} steps before the peak, by {e.first_signal}" for e in spikes)
    good = any(e.onset_step == BLOOM_ONSET and e.actionable for e in spikes)
    return Score("BLOOM's spike", text or "not seen", f"step {BLOOM_ONSET}", good)


def _healthy(logs: list[Scanned]) -> list[Score]:
    """Count actionable alarms over the points of all healthy logs."""
    if not logs:
        return []
    alarms, points = sum(_alarms(log.events) for log in logs), sum(log.points for log in logs)
    rate = 1000 * alarms / points
    text = f"{rate:.4f} ({alarms} in {points} points of {len(logs)} logs)"
    return [Score("actionable alarms per 1000 healthy points", text, f"<= {ALARMS_PER_1000}", rate <= ALARMS_PER_1000)]


def _alarms(events: Iterable[Event]) -> int:
    return sum(event.actionable for event in events)


def _outliers(labels: list[dict[str, str]], found: dict[str, Scanned]) -> list[Score]:
    """Check labelled hard batches in logs of every step: they are seen, classed, and raise no actionable alarm."""
    single = [row for row in labels if row["duration_steps"] == "0"]
    if not single:
        return []
    events = [next((e for e in found[row["file"]].events if e.onset_step == int(row["onset_step"])), None) for row in single]
    classed = [event is not None and event.kind == "outlier_batch" for event in events]
    escalated = sum(event is not None and event.actionable for event in events)
    files = {row["file"] for row in single}
    others = sum(e.actionable for file in files for e in found[file].events)
    return [
        share("one-batch outliers classed as such", sum(classed), len(classed), 0.95),
        Score("one-batch outliers escalated", f"{escalated}, and {others} alarms in their logs", "0", escalated == 0),
    ]


def _rises(name: str, logs: list[Scanned], goal: float) -> Score | None:
    """Count logs whose first slow rise was reported while the loss was less than RISE_NATS over its best."""
    if not logs:
        return None
    heights = [height for height in map(_height_when_reported, logs) if height is not None]
    detail = "reported at " + ", ".join(f"+{height:.3f}" for height in heights) if heights else ""
    return share(name, sum(height < RISE_NATS for height in heights), len(logs), goal, detail)


def _height_when_reported(log: Scanned) -> float | None:
    """Return the median loss of the last 64 points when the first rise was reported, over the best mean of 1536 points before."""
    rise = next((event for event in log.events if event.kind == "slow_rise"), None)
    if rise is None:
        return None
    data = read_logs(Path(log.file))[0]
    losses = data.columns["loss"][: int(np.searchsorted(data.steps, rise.evidence["actionable_step"], side="right"))]
    sums = np.cumsum(np.insert(losses, 0, 0.0))
    return float(np.median(losses[-64:]) - (sums[1536:] - sums[:-1536]).min() / 1536)


def _silence(logs: list[Scanned]) -> Score | None:
    if not logs:
        return None
    loud = sum(event.actionable or event.kind == "slow_rise" for log in logs for event in log.events)
    return Score("alarms in 410m logs", f"{loud} in {sum(log.points for log in logs)} points", "0", loud == 0)


def _pairs(logs: list[Scanned]) -> Score | None:
    """Judge each pair of runs with one order of data: both spike because of the data."""
    if not logs:
        return None
    steps = [[event.onset_step for event in log.events if KINDS[event.kind].is_spike and event.delta > 0] for log in logs]
    verdicts = [
        coincident(steps[a], steps[b], min(logs[a].points, logs[b].points)).verdict
        for a, b in itertools.combinations(range(len(logs)), 2)
    ]
    return share('"data" for pairs of ValueEmbed runs', verdicts.count("data"), len(verdicts), 1.0)


def _one_nan(logs: list[Scanned]) -> list[Score]:
    """Put one NaN into the middle of a healthy log: it adds one event, and hides nothing after it."""
    scores = []
    for log in logs[:1]:
        data = read_logs(Path(log.file))[0]
        losses = data.columns["loss"].copy()
        at = len(losses) // 2
        losses[at] = np.nan
        events = scan(data.steps, data.columns | {"loss": losses})
        before, after = ({(event.onset_step, event.kind) for event in found} for found in (log.events, events))
        added, lost = after - before, before - after
        text = f"{len(added)} event more, {len(lost)} fewer"
        scores.append(
            Score("one NaN in a healthy log", text, "1 event", added == {(int(data.steps[at]), "precision")} and not lost)
        )
    return scores


def score_speed(folder: Path, wanted: int = SPEED_POINTS) -> list[Score]:
    """Time files on disk to events, in as many processes as there are cores; the logs are read until `wanted` points are had."""
    files = _logs_in(folder)
    points = sum(len(log.steps) for path in files for log in read_logs(path))
    started = time.perf_counter()
    scanned = sum(found.points for found in scan_files(files * -(-wanted // points)))
    seconds = (time.perf_counter() - started) * SPEED_POINTS / scanned
    return [
        Score(
            f"{SPEED_POINTS / 1e6:.1f} million points scanned",
            f"{seconds:.1f} s",
            f"< {SPEED_SECONDS:.0f} s",
            seconds < SPEED_SECONDS,
        )
    ]


def _logs_in(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*.csv*") if path.name != "labels.csv")
    if not files:
        raise UsageError(f"{folder} has no logs beside labels.csv")
    return files
