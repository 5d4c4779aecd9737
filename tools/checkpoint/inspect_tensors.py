"""Prints shape, norm, range and non-finite elements of every tensor of a checkpoint."""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from recipes.common.checkpoint.reader import Reader
from tools.checkpoint.contents import elements, open_checkpoint, row_blocks, sum_of_squares
from tools.common.console import GOOD, UsageError, progress_bar, table


@dataclass(frozen=True)
class TensorStats:
    """Statistics of one tensor and kind. norm, min, max: over its finite elements (None where there is none)."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    norm: float
    min: float | None
    max: float | None
    zeros: int
    non_finite: int


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="RUN/checkpoints/latest, or one of its steps")
    parser.add_argument("--name", metavar="PATTERN", help="part of a tensor's name, or a pattern with * and ?")
    parser.add_argument("--kind", help="master, exp_avg, exp_avg_sq, buffer, ... (default: all)")


def run(args: argparse.Namespace) -> int:
    reader = Reader(open_checkpoint(args.checkpoint))
    names = matching(reader, args.name)
    chosen = [(n, k) for n in names for k in sorted(reader.tensors[n]["kinds"]) if args.kind in (None, k)]
    if not chosen:
        raise UsageError(f"{args.checkpoint}: nothing matches --name {args.name} --kind {args.kind}")
    with progress_bar("reading", sum(4 * elements(reader, name) for name, _ in chosen)) as bar:
        stats = []
        for name, kind in chosen:
            stats.append(tensor_stats(reader, name, kind))
            bar.update(4 * elements(reader, name))
    totals = {kind: _total([s for s in stats if s.kind == kind]) for kind in sorted({s.kind for s in stats})}
    if args.json:
        print(json.dumps({"state": reader.state, "tensors": [asdict(s) for s in stats], "totals": totals}))
        return GOOD
    rows = [
        [s.name, s.kind, _shape(s.shape), _number(s.norm), _number(s.min), _number(s.max), s.zeros, s.non_finite] for s in stats
    ]
    print(table(rows, ["tensor", "kind", "shape", "norm", "min", "max", "zeros", "non-finite"]))
    print(f"\nstep {reader.state['step']}, {reader.state['consumed_seqs']} sequences consumed, tied head: {reader.state['tied']}")
    for kind, total in totals.items():
        print(f"{kind}: {total['elements']:,} elements, norm {total['norm']:.6g}, {total['non_finite']} non-finite")
    return GOOD


def matching(reader: Reader, pattern: str | None) -> list[str]:
    """Return the names that contain `pattern`, or match it where it has wildcards."""
    if pattern is None:
        return list(reader.tensors)
    glob = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    return [name for name in reader.tensors if fnmatch.fnmatchcase(name, glob)]


def tensor_stats(reader: Reader, name: str, kind: str) -> TensorStats:
    squares, low, high, zeros, bad = 0.0, math.inf, -math.inf, 0, 0
    for block in row_blocks(reader, name, kind):
        values = block.reshape(-1)
        finite = np.isfinite(values)
        if not finite.all():
            bad += values.size - int(finite.sum())
            values = values[finite]
        if values.size:
            low, high = min(low, float(values.min())), max(high, float(values.max()))
            zeros += values.size - int(np.count_nonzero(values))
            squares += sum_of_squares(values)
    dtype = reader.tensors[name]["kinds"][kind]["dtype"]
    found = low <= high
    return TensorStats(
        name, kind, reader.shape(name), dtype, math.sqrt(squares), low if found else None, high if found else None, zeros, bad
    )


def _total(stats: list[TensorStats]) -> dict[str, float]:
    return {
        "elements": sum(math.prod(s.shape) for s in stats),
        "norm": math.sqrt(sum(s.norm**2 for s in stats)),
        "non_finite": sum(s.non_finite for s in stats),
    }


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
