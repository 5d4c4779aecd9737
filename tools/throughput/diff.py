"""`diff A B`: shows which parts of a step, and which communication, made the difference between two runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tools.common.console import GOOD, human_bytes, table
from tools.throughput.report import NAMES
from tools.throughput.timings import Timings, communication, read_timings

MOST_ROWS = 10  # of communication


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="RUN_A", type=Path, help="a run directory")
    parser.add_argument("second", metavar="RUN_B", type=Path, help="another")


def run(flags: argparse.Namespace) -> int:
    found = compare(read_timings(flags.first), read_timings(flags.second))
    print(json.dumps(found) if flags.json else _text(found))
    return GOOD


def compare(first: Timings, second: Timings) -> dict[str, Any]:
    """Return the parts in ms a step, the mean over ranks, the largest change first; the changes sum to the step's."""
    a, b = first.mean(), second.mean()
    parts = [{"part": part, "a_ms": a[part], "b_ms": b[part], "change_ms": b[part] - a[part]} for part in a]
    kinds = [{row_key(row): row for row in communication(each)} for each in (first, second)]
    changed = []
    for key in kinds[0].keys() | kinds[1].keys():
        ms = [each[key]["ms_per_step"] if key in each else 0.0 for each in kinds]
        row = kinds[0].get(key) or kinds[1][key]
        what = {name: row[name] for name in ("group", "op", "bytes", "ranks")}
        changed.append(what | {"a_ms": ms[0], "b_ms": ms[1], "change_ms": ms[1] - ms[0]})
    layouts = [
        {n: getattr(each, n) for n in ("pipeline", "data", "tensor", "schedule", "micro_batches")} for each in (first, second)
    ]
    return {
        "a": {"run": str(first.run), "step_ms": sum(a.values()), **layouts[0]},
        "b": {"run": str(second.run), "step_ms": sum(b.values()), **layouts[1]},
        "parts": sorted(parts, key=lambda row: -abs(row["change_ms"])),
        "communication": sorted(changed, key=lambda row: -abs(row["change_ms"])),
    }


def row_key(row: dict[str, Any]) -> tuple:
    return row["group"], row["op"], row["bytes"], row["ranks"]


def _text(found: dict[str, Any]) -> str:
    a, b = found["a"], found["b"]
    change = b["step_ms"] - a["step_ms"]
    lines = [
        f"{which}: {side['run']}, tensor {side['tensor']} x pipeline {side['pipeline']} x data {side['data']}, "
        f"{side['schedule']}, {side['micro_batches']} micro batches, a step {side['step_ms']:.1f} ms"
        for which, side in (("A", a), ("B", b))
    ]
    lines.append(f"B takes {b['step_ms'] / a['step_ms']:.3f} x A's time: {change:+.1f} ms")
    rows = [
        [NAMES.get(row["part"], row["part"]), f"{row['a_ms']:.1f}", f"{row['b_ms']:.1f}", f"{row['change_ms']:+.1f}"]
        for row in found["parts"]
        if row["a_ms"] or row["b_ms"]
    ]
    sent = [
        [row["group"], row["op"], human_bytes(row["bytes"]), row["ranks"], f"{row['a_ms']:.2f}", f"{row['b_ms']:.2f}",
         f"{row['change_ms']:+.2f}"]
        for row in found["communication"][:MOST_ROWS]
    ]  # fmt: skip
    text = "\n".join(lines) + "\n\n" + table(rows, ["ms a step", "A", "B", "B - A"])
    header = ["group", "operation", "size", "ranks", "A", "B", "B - A"]
    return text + ("\n\ncommunication, ms a step\n" + table(sent, header) if sent else "")
