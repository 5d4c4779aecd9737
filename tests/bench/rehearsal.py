"""Rehearses the shelf without a GPU: each recipe's layouts, their first, a middle and their last stage, against the planner.

    python -m tests.bench.rehearsal [RECIPE...] [--largest] [--layers N] [--log FILE] [--json]

Exits 1 where NCCL would refuse a message, ranks would run out of memory, or the peak is not within 5 % of the planner's. With
--log every result is also written to a file, and those already there are not rehearsed again.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from recipes.common.config.placement import coordinates
from recipes.common.recipe import ROOT, Layout, Recipe, derive_sizes
from tests.support.shelf import read_shelf
from tools.common.console import FAILED, GOOD, UsageError, exit_code, progress_bar, quiet_transformers, table
from tools.common.devices import GIB, find_device
from tools.common.recipe_io import load_recipe
from tools.plan.calibrate import shorten
from tools.plan.rehearsal.predicted import predict
from tools.plan.rehearsal.rehearsal_case import Rehearsal
from tools.plan.rehearsal.rehearsing import Rehearser
from tools.plan.rehearsal.step_summary import summarize
from tools.plan.rehearse import step_lengths

GPU = find_device("H100")
NEAR = 0.05
FOR_CPUS = ("quickstart",)


@dataclass(frozen=True)
class ShelfCase:
    """One rank of a shelf recipe's layout."""

    recipe: Recipe
    gpus: int
    layout: Layout
    rank: int

    @property
    def stage(self) -> int:
        return coordinates(self.rank, self.gpus, self.layout).pipeline_rank

    @property
    def key(self) -> str:
        return f"{self.recipe.name} {self.gpus} {self.rank}"


def cases(names: list[str], *, largest: bool, layers: int | None) -> Iterator[ShelfCase]:
    """Yield the first, a middle and the last stage of each layout. Those that differ in their data ranks only come once.

    largest: with most GPUs; else with fewest. layers: only so many of the model.
    """
    for name in names:
        recipe, seen = shorten(load_recipe(str(ROOT / "recipes" / f"{name}.py")), layers), set()
        for gpus in sorted(recipe.layouts, reverse=largest):
            layout = recipe.layouts[gpus]
            if layout in seen:
                continue
            seen.add(layout)
            ranks_of_stage = gpus // layout.pipeline
            for stage in sorted({0, layout.pipeline // 2, layout.pipeline - 1}):
                yield ShelfCase(recipe, gpus, layout, stage * ranks_of_stage)


def measure(case: ShelfCase, rehearser: Rehearser) -> dict[str, Any]:
    accumulation = derive_sizes(case.recipe, case.layout, case.gpus).accumulation
    steps = step_lengths(case.layout, accumulation)
    recipe = replace(case.recipe, mask_documents=False)  # as most runs; what it costs is in the suite
    given = {"recipe": recipe, "layout": case.layout, "world_size": case.gpus, "rank": case.rank, "micro_batches": steps}
    rehearser.start(Rehearsal(**given), GPU)
    planned = predict(recipe, case.layout, case.gpus, case.stage, accumulation, GPU)
    summary = summarize(rehearser.result(), accumulation)
    once, each = summary.waits_of_step()
    kernels, moved = summary.layer_share()
    return {
        "recipe": case.recipe.name, "gpus": case.gpus, "rank": case.rank, "stage": case.stage, "peak": summary.peak,
        "planned": planned.peak, "micro_batches": accumulation, "waits": [once, each], "group_calls": summary.group_calls,
        "layer": [kernels, moved], "broken": summary.broken, "unanswered": summary.unanswered,
    }  # fmt: skip


def is_good(row: dict[str, Any]) -> bool:
    return not row["broken"] and row["peak"] < GPU.memory and abs(row["peak"] / row["planned"] - 1) <= NEAR


def run(args: argparse.Namespace) -> int:
    quiet_transformers()
    shelf = [name for name in read_shelf() if name not in FOR_CPUS]
    if unknown := [name for name in args.recipes if name not in shelf]:
        raise UsageError(f"{', '.join(unknown)}: not on the shelf, which has {', '.join(shelf)}")
    known = {}
    if args.log is not None and args.log.exists():
        known = {
            f"{row['recipe']} {row['gpus']} {row['rank']}": row for row in map(json.loads, args.log.read_text().splitlines())
        }
    rows, found = [], list(cases(args.recipes or shelf, largest=args.largest, layers=args.layers))
    with Rehearser() as rehearser, progress_bar("rehearsing", len(found), unit="rank") as bar:
        for case in found:
            row = known.get(case.key) or measure(case, rehearser)
            if args.log is not None and case.key not in known:
                with args.log.open("a") as log:
                    log.write(json.dumps(row) + "\n")
            rows.append(row)
            bar.update()
    print(json.dumps({"rows": rows}) if args.json else _text(rows))
    return GOOD if all(map(is_good, rows)) else FAILED


def _text(rows: list[dict[str, Any]]) -> str:
    header = ["recipe", "GPUs", "stage", "peak GiB", "planned", "off", "waits", "a micro batch", "group calls", "kernels", ""]
    return table(
        [
            [
                row["recipe"], row["gpus"], row["stage"], f"{row['peak'] / GIB:.2f}", f"{row['planned'] / GIB:.2f}",
                f"{row['peak'] / row['planned'] - 1:+.1%}", f"{row['waits'][0]:.0f}", f"{row['waits'][1]:.0f}",
                row["group_calls"], f"{row['layer'][0]:.0f}", "" if is_good(row) else "!",
            ]
            for row in rows
        ],
        header,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.rehearsal", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="names on the shelf (default: all)")
    parser.add_argument(
        "--largest", action="store_true", help="of layouts that differ in data ranks only, the one with most GPUs"
    )
    parser.add_argument("--layers", type=int, metavar="N", help="rehearse the first layers only (default: all)")
    parser.add_argument("--log", type=Path, metavar="FILE", help="where results are kept; those in it are not made again")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, nothing else there")
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
