"""`bench`: every number that the tool promises, from one command, beside its goal."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict

from tests.bench.spikes.detection import score_detection, score_speed
from tests.bench.spikes.monitor_overhead import measure_overhead
from tests.bench.spikes.planted_causes import score_causes
from tests.bench.spikes.scores import Score
from tools.common.console import FAILED, GOOD, UsageError, table


def run(flags: argparse.Namespace) -> int:
    if not (flags.folder / "labels.csv").is_file():
        raise UsageError(f"{flags.folder} has no labels.csv: a folder of logs, laid out as tests/bench/spikes/detection.py says")
    parts: dict[str, Callable[[], list[Score]]] = {
        "detection": lambda: score_detection(flags.folder),
        "speed": lambda: score_speed(flags.folder),
        "causes": score_causes,
        "monitor": measure_overhead,
    }
    if flags.only not in (None, *parts):
        raise UsageError(f"--only {flags.only}: must be one of {', '.join(parts)}")
    scores = {name: part() for name, part in parts.items() if flags.only in (None, name)}
    good = all(score.good for found in scores.values() for score in found)
    if flags.json:
        print(json.dumps({"good": good, "scores": {name: [asdict(s) for s in found] for name, found in scores.items()}}))
        return GOOD if good else FAILED
    rows = [[name, s.name, s.value, s.goal, "pass" if s.good else "MISSED"] for name, found in scores.items() for s in found]
    print(table(rows, ["part", "what", "measured", "goal", ""]))
    return GOOD if good else FAILED
