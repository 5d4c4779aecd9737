"""`changed A B`: what differs between two runs, or segments of one, the gravest first; where their numbers part; known incidents.

A and B are run directories, segments of one (RUN:2, as `changed lineage` numbers them), or logs that `tools.spikes scan` reads.
Two runs are compared in the segments that were in force at the same steps. Each difference stands under what it can change; one
that follows from another is shown, and not counted. The rounding to be expected: tools/changed/README.md. The picture,
of the first number that parts, is written into B (or to --out).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from recipes.common.config.field_effects import Effect
from recipes.common.run_dir.difference import Difference, short_value
from recipes.common.run_dir.differences import counted, find_differences, not_recorded, short_name, verdict
from recipes.common.run_dir.metrics import plain
from recipes.common.run_dir.segments import Segment
from tools.changed.incident import Compared, Incident
from tools.changed.incidents_of_numbers import number_incidents
from tools.changed.incidents_of_record import record_incidents
from tools.changed.part import ROUNDOFF, Metrics, Parting, coarser, compare_metrics, told_columns
from tools.changed.picture import draw_parting
from tools.changed.side import Side, open_side
from tools.common.console import GOOD, UsageError, machine_words, printable, table

MOST_COLUMNS = 8  # that a table of the numbers shows
LONGEST = 56  # letters of a value
BOUNDARY = 16  # steps on each side of where one segment follows another


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="a run directory, a segment of one (RUN:2), or a log")
    parser.add_argument("b", metavar="B", help="the same")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the picture to write: .svg, .png or .pdf (default: changed.svg in B)"
    )


def run(flags: argparse.Namespace) -> int:
    compared, missing = compare(flags.a, flags.b)
    incidents = [*record_incidents(compared), *number_incidents(compared)]
    picture = _draw(compared, flags.out)
    if flags.json:
        print(json.dumps(_as_json(compared, missing, incidents, picture), allow_nan=False))
    else:
        print(printable("\n".join(_report(compared, missing, incidents, picture))))
    return GOOD


def compare(a: str, b: str) -> tuple[Compared, dict[str, int]]:
    """Return both with their differences and numbers, and what only one of them records: group of facts -> how many."""
    sides = open_side(a), open_side(b)
    differences, missing = _differences(*sides)
    paths = [side.record.source for side in sides]
    of_one = paths[0].resolve() == paths[1].resolve()
    return Compared(*sides, (open_side(str(paths[0])),) if of_one else sides, differences, _metrics(*sides)), missing


def _metrics(a: Side, b: Side) -> Metrics | None:
    if a.table is None or b.table is None:
        return None
    printed = (not a.record.source.is_dir(), not b.record.source.is_dir())
    known = [side.precision for side in (a, b) if side.precision]
    return compare_metrics(a.table, b.table, coarser(*known) if known else "bf16", printed)


def _differences(a: Side, b: Side) -> tuple[list[Difference], dict[str, int]]:
    """Return the differences of all pairs of segments that were in force at one step in both."""
    found: dict[str, Difference] = {}
    missing: dict[str, int] = {}
    for one, other in _pairs(a, b):
        patches = a.record.patch(one), b.record.patch(other)
        facts = one.facts, other.facts
        missing |= not_recorded(*facts)
        if a.record.sealed != b.record.sealed:  # what an earlier version wrote of a group is less than all of it
            only = {name for name in facts[0].keys() ^ facts[1].keys() if not name.startswith("recipe.")}
            missing |= {"others": len(only) - sum(missing.values())} if len(only) > sum(missing.values()) else {}
            facts = tuple({name: value for name, value in each.items() if name not in only} for each in facts)
        for difference in find_differences(*facts, patches):
            found.setdefault(f"{difference.name} {difference.effect}", difference)
    order = list(Effect)
    return sorted(found.values(), key=lambda d: (order.index(d.effect), bool(d.follows), d.name)), missing


def _pairs(a: Side, b: Side) -> list[tuple[Segment, Segment]]:
    """Return the segments that were in force at the same steps; those asked for, or the last ones, where none were."""
    if a.newest is None or b.newest is None:
        return []
    if a.record.chosen is not None or b.record.chosen is not None:
        return [(a.newest, b.newest)]
    last = min((int(side.table["step"].max()) for side in (a, b) if side.table is not None), default=0)
    starts = sorted({0, *(segment.step for side in (a, b) for segment in side.record.segments)})
    pairs = [(a.record.at(step + 1), b.record.at(step + 1)) for step in starts if step < last]
    known = {(one.index, other.index): (one, other) for one, other in pairs if one is not None and other is not None}
    return list(known.values()) or [(a.newest, b.newest)]


def _draw(compared: Compared, out: Path | None) -> Path | None:
    """Write the picture; None where the runs have no step in common, or the folder of B takes no file and none was named."""
    metrics, b = compared.metrics, compared.b.record.source
    if metrics is None or not metrics.columns:
        if out is not None:
            raise UsageError(
                f"--out={out}: there is nothing to draw, {compared.a.name} and {compared.b.name} have no step in common"
            )
        return None
    column = metrics.first.column if metrics.first else "loss"
    column = column if np.ptp(metrics.columns[column][0]) or "loss" not in metrics.columns else "loss"
    path = out or (b / "changed.svg" if b.is_dir() else Path(f"{b.name}.changed.svg"))
    if out is None and not os.access(path.parent, os.W_OK):
        print(f"no picture: {path.parent} cannot be written; name a file with --out", file=sys.stderr)
        return None
    try:
        draw_parting(compared.a, compared.b, metrics, column, path)
    except (OSError, ValueError) as error:  # ValueError: matplotlib does not write files of this suffix
        raise UsageError(f"--out={path}: {machine_words(error) or error}") from None
    return path


def _as_json(compared: Compared, missing: dict[str, int], incidents: Sequence[Incident], picture: Path | None) -> dict[str, Any]:
    able, unable = counted(compared.differences)
    metrics = compared.metrics
    return {
        "a": compared.a.name,
        "b": compared.b.name,
        "differences": [
            vars(d)
            | {"old": _plain(d.old), "new": _plain(d.new)}
            | {"effect": d.effect.name.lower(), "changes": d.effect.value, "can_change_loss": d.can_change_loss}
            for d in compared.differences
        ],
        "can_change_loss": able,
        "cannot": unable,
        "verdict": verdict(compared.differences),
        "not_recorded": missing,
        "common_steps": 0 if metrics is None else len(metrics.steps),
        "precision": None if metrics is None else metrics.precision,
        "equal": [] if metrics is None else list(metrics.equal),
        "partings": [] if metrics is None else [parting.as_json() for parting in metrics.partings],
        "boundary": boundary(compared.a, compared.b),
        "incidents": [incident.as_json() for incident in incidents],
        "picture": None if picture is None else str(picture),
    }


def _plain(value: Any) -> Any:
    """Return a fact's value as JSON can hold it: a model's configuration may have an infinity."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else plain(value)


def _report(compared: Compared, missing: dict[str, int], incidents: Sequence[Incident], picture: Path | None) -> Iterator[str]:
    yield from _told_differences(compared.differences)
    for group, count in missing.items():
        yield f"not compared: {count} facts of {group}, which only one of the two records"
    logs = [side.name for side in (compared.a, compared.b) if not side.record.segments]
    if logs:
        yield f"only the numbers are compared: nothing is recorded of {' and '.join(logs)}"
    else:
        yield verdict(compared.differences)
    yield ""
    yield from _told_metrics(compared)
    if incidents:
        yield "\nwhat it looks like"
        for incident in incidents:
            yield f"  {incident.kind}: {incident.text}"
            yield from (f"      {line}" for line in incident.evidence)
    if picture is not None:
        yield f"\n{picture}"


def _told_differences(differences: Sequence[Difference]) -> Iterator[str]:
    for effect, group in groupby(differences, key=lambda d: d.effect):
        yield effect.value
        rows = [
            [
                f"  {'  ' * bool(d.follows)}{short_name(d.name)}",
                short_value(d.old, LONGEST),
                short_value(d.new, LONGEST),
                _note(d),
            ]
            for d in group
        ]
        yield "\n".join(table(rows, ["", "", "", ""]).split("\n")[1:])


def _note(difference: Difference) -> str:
    return f"follows from {short_name(difference.follows)}" if difference.follows else difference.note


def _told_metrics(compared: Compared) -> Iterator[str]:
    metrics = compared.metrics
    if metrics is None:
        told = boundary(compared.a, compared.b)
        yield told or "their numbers cannot be compared: they have no step in common"
        return
    span = f"{len(metrics.steps)} common steps, {metrics.steps[0]} to {metrics.steps[-1]}"
    if metrics.first is None:
        yield f"{span}: every number is equal ({', '.join(metrics.equal)})"
        return
    yield f"{span}; the first to part is {_told(metrics.first, metrics)}"
    rows = [
        [
            p.column,
            p.step,
            f"{p.a:.9g}",
            f"{p.b:.9g}",
            f"{p.difference:+.2g}",
            f"{p.expected:.2g}" if p.expected else "none",
            _how(p),
        ]
        for p in told_columns(metrics)
    ][:MOST_COLUMNS]
    yield table(rows, ["number", "from step", "first", "second", "difference", "rounding", ""])
    if metrics.equal:
        yield f"equal: {', '.join(metrics.equal)}"


def _told(parting: Parting, metrics: Metrics) -> str:
    words = f"{parting.column} at step {parting.step}, by {parting.difference:+.3g}"
    if not math.isfinite(parting.difference):
        return f"{parting.column} at step {parting.step}, which is not finite in one of the two"
    if not parting.expected:
        return f"{words}; it has no rounding"
    times = _times(abs(parting.difference) / parting.expected)
    unit = f"{metrics.precision}, unit roundoff {ROUNDOFF[metrics.precision]:.1g}"
    words += f", {times} times the rounding to be expected ({parting.expected:.2g}: {unit})"
    return words + (
        f" and {_times(abs(parting.difference) / parting.noise)} times the noise of its steps" if parting.noise else ""
    )


def _times(factor: float) -> str:
    return f"{factor:,.0f}" if 100 <= factor < 1e7 else f"{factor:.2g}"


def _how(parting: Parting) -> str:
    if not parting.expected:
        return "exact"
    if parting.within_rounding:
        return "within rounding"
    return "beyond rounding" if parting.jump == parting.step else f"beyond rounding from step {parting.jump} on"


def boundary(a: Side, b: Side) -> str:
    """Return how the loss goes on where one of two segments of a run follows the other; "" where none does."""
    if a.record.source.resolve() != b.record.source.resolve() or a.newest is None or b.newest is None:
        return ""
    early, late = sorted((a, b), key=lambda side: side.newest.index if side.newest else 0)
    step = late.newest.step if late.newest else 0
    before = [v for s, v in early.column("loss").items() if step - BOUNDARY < s <= step]
    after = [v for s, v in late.column("loss").items() if step < s <= step + BOUNDARY]
    if len(before) < 3 or len(after) < 3:
        return ""
    slope = np.polyfit(np.arange(len(before)), before, 1)
    expected = [np.polyval(slope, len(before) + i) for i in range(min(3, len(after)))]
    noise = float(np.std(np.array(before) - np.polyval(slope, np.arange(len(before))), ddof=2)) if len(before) > 3 else 0.0
    moved = float(np.mean(np.array(after[: len(expected)]) - expected))
    times = f", {abs(moved) / noise:.2g} times the noise of the steps before" if noise else ""
    index = late.newest.index if late.newest else 0
    return f"after step {step}, where segment {index} begins, the loss moves by {moved:+.3g}{times}"
