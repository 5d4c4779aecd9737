"""Scores what `tools.spikes` promises, each figure beside its goal; exit 1 when a goal is missed.

    python -m tests.bench.spikes DIR [--only detection|speed|causes|monitor] [--json]

detection, speed: the detectors on the logs of DIR, which has a labels.csv (tests/bench/spikes/detection.py says how it is laid
out). causes: `explain` on small runs with a planted cause. monitor: what watching costs a step. The last two need no DIR.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import argparse
import json
from dataclasses import asdict

from tests.bench.spikes.detection import score_detection, score_speed
from tests.bench.spikes.monitor_overhead import score_overhead
from tests.bench.spikes.planted_causes import score_causes
from tests.bench.spikes.scores import Score
from tools.common.console import FAILED, GOOD, UsageError, exit_code, table

PARTS = ("detection", "speed", "causes", "monitor")
ON_LOGS = ("detection", "speed")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.spikes", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", metavar="DIR", help=f"logs and labels.csv, for {' and '.join(ON_LOGS)}")
    parser.add_argument("--only", choices=PARTS, help="one part (default: all)")
    parser.add_argument("--points", type=int, default=3_500_000, help="of `speed`, to scan (default: %(default)s)")
    parser.add_argument("--runs", type=int, help="of `causes`, the first held-out runs (default: all)")
    parser.add_argument("--pairs", type=int, default=40, help="of `monitor`, steps with and without it (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, nothing else there")
    return parser.parse_args(argv)


def run(flags: argparse.Namespace) -> int:
    chosen = PARTS if flags.only is None else (flags.only,)
    for name in ("points", "runs", "pairs"):
        if (value := getattr(flags, name)) is not None and value < 1:
            raise UsageError(f"--{name}={value}: must be 1 or more")
    if set(chosen) & set(ON_LOGS) and not (flags.folder and (flags.folder / "labels.csv").is_file()):
        raise UsageError(f"DIR={flags.folder}: has no labels.csv; give a folder laid out as tests/bench/spikes/detection.py says")
    parts = {
        "detection": lambda: score_detection(flags.folder),
        "speed": lambda: score_speed(flags.folder, flags.points),
        "causes": lambda: score_causes(flags.runs),
        "monitor": lambda: score_overhead(flags.pairs),
    }
    scores: dict[str, list[Score]] = {name: parts[name]() for name in chosen}
    good = all(score.good for found in scores.values() for score in found)
    if flags.json:
        print(json.dumps({"good": good, "scores": {name: [asdict(s) for s in found] for name, found in scores.items()}}))
    else:
        rows = [[name, s.name, s.value, s.goal, "pass" if s.good else "MISSED"] for name, found in scores.items() for s in found]
        print(table(rows, ["part", "what", "measured", "goal", ""]))
    return GOOD if good else FAILED


def main(argv: list[str] | None = None) -> int:
    flags = parse_args(argv)
    return exit_code(lambda: run(flags))


if __name__ == "__main__":
    sys.exit(main())
