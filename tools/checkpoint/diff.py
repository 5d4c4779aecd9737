"""Prints the largest differences between two checkpoints, by tensor; exit 1 when anything differs."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from recipes.common.checkpoint.reader import Reader
from tools.checkpoint.contents import elements, open_checkpoint, row_blocks, sum_of_squares
from tools.common.console import FAILED, GOOD, progress_bar, table


@dataclass(frozen=True)
class Difference:
    """The difference of one tensor and kind between two checkpoints."""

    name: str
    kind: str
    elements: int
    changed: int  # elements whose values differ; two NaN are equal
    largest: float  # of |a - b|
    relative: float  # |a - b| / max(|a|, |b|), Euclidean norms


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, metavar="A", help="a checkpoint")
    parser.add_argument("b", type=Path, metavar="B", help="another")
    parser.add_argument("--top", type=int, default=20, metavar="N", help="rows to print (default: %(default)s; --json has all)")


def run(args: argparse.Namespace) -> int:
    a, b = Reader(open_checkpoint(args.a)), Reader(open_checkpoint(args.b))
    with progress_bar("comparing", sum(8 * elements(a, name) * len(e["kinds"]) for name, e in a.tensors.items())) as bar:
        found = compare(a, b, bar)
    same = not any(found[key] for key in ("differences", "only_in_a", "only_in_b", "other_shape"))
    if args.json:
        print(json.dumps({"a": str(args.a), "b": str(args.b), "equal": same, **found}))
    else:
        _show(found, args.top, same)
    return GOOD if same else FAILED


def compare(a: Reader, b: Reader, bar: tqdm) -> dict[str, Any]:
    """Return everything that is not equal in two checkpoints; "differences" come with the largest relative one first."""
    only_a, only_b, shapes, found = [], [], [], []
    for name in sorted(a.tensors.keys() | b.tensors.keys()):
        kinds_a = set(a.tensors.get(name, {}).get("kinds", ()))
        kinds_b = set(b.tensors.get(name, {}).get("kinds", ()))
        only_a += [f"{kind} {name}" for kind in sorted(kinds_a - kinds_b)]
        only_b += [f"{kind} {name}" for kind in sorted(kinds_b - kinds_a)]
        if kinds_a & kinds_b and a.shape(name) != b.shape(name):
            shapes.append(f"{name}: {list(a.shape(name))} and {list(b.shape(name))}")
            continue
        for kind in sorted(kinds_a & kinds_b):
            difference = tensor_difference(a, b, name, kind)
            found += [difference] if difference.changed else []
            bar.update(8 * difference.elements)
    found.sort(key=lambda d: (-d.relative, -d.largest, d.name, d.kind))
    keys = sorted(a.state.keys() | b.state.keys())
    state = {key: [a.state.get(key), b.state.get(key)] for key in keys if a.state.get(key) != b.state.get(key)}
    return {
        "differences": [asdict(difference) for difference in found],
        "only_in_a": only_a,
        "only_in_b": only_b,
        "other_shape": shapes,
        "state": state,
    }


def tensor_difference(a: Reader, b: Reader, name: str, kind: str) -> Difference:
    """Compare a tensor that both hold in one shape. A number against NaN or infinity is an infinite difference."""
    changed, largest, difference, of_a, of_b = 0, 0.0, 0.0, 0.0, 0.0
    for left, right in zip(row_blocks(a, name, kind), row_blocks(b, name, kind), strict=True):
        different = ~((left == right) | ((left != left) & (right != right)))
        changed += int(different.sum())
        of_a, of_b = of_a + sum_of_squares(left), of_b + sum_of_squares(right)
        if different.any():
            gap = left[different].astype(np.float64) - right[different].astype(np.float64)
            gap = np.where(np.isfinite(gap), np.abs(gap), np.inf)
            largest = max(largest, float(gap.max()))
            difference += float(np.square(gap).sum())
    scale = math.sqrt(max(of_a, of_b))
    relative = 0.0 if not changed else math.sqrt(difference) / scale if 0 < scale < math.inf else math.inf
    return Difference(name, kind, elements(a, name), changed, largest, relative)


def _show(found: dict[str, Any], top: int, same: bool) -> None:
    for key, (left, right) in found["state"].items():
        print(f"state {key}: {left} and {right}")
    for line in [f"only in A: {line}" for line in _few(found["only_in_a"])] + [
        f"only in B: {line}" for line in _few(found["only_in_b"])
    ]:
        print(line)
    for line in found["other_shape"]:
        print(f"other shape: {line}")
    shown = found["differences"][:top]
    rows = [
        [d["name"], d["kind"], f"{d['relative']:.3e}", f"{d['largest']:.3e}", f"{d['changed'] / d['elements']:.1%}"]
        for d in shown
    ]
    if rows:
        print(table(rows, ["tensor", "kind", "relative", "largest", "elements changed"]))
    if len(found["differences"]) > len(shown):
        print(f"... and {len(found['differences']) - len(shown)} more with smaller differences")
    if same:
        print("all tensors are equal")


def _few(names: list[str]) -> list[str]:
    """Shorten ["exp_avg a", "exp_avg b", ...] to one line a kind."""
    kinds: dict[str, list[str]] = {}
    for entry in names:
        kind, _, name = entry.partition(" ")
        kinds.setdefault(kind, []).append(name)
    return [f"{kind} of {len(n)} tensors: {', '.join(n[:3])}{', ...' if len(n) > 3 else ''}" for kind, n in kinds.items()]
