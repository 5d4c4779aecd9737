"""Measures what the timers cost: CPU time of steps with the clock running and with it off, by turns.

    python -m tests.bench.timers [RECIPE] [--layout tensor=2,pipeline=2] [--rounds 40] [--json]

CPU time of the rank's own thread, so that waiting for others and what else the machine does count little; medians.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass

import torch

from recipes.common.engine.build_trainer import build_recipe_trainer
from recipes.common.recipe import ROOT, RecipeError, derive_sizes
from recipes.common.run_dir.timing_files import TimingWriter
from recipes.common.runtime.step_clock import CLOCK
from tools.common.console import GOOD, UsageError, exit_code, table
from tools.common.forked_ranks import run_ranks
from tools.common.recipe_io import load_recipe, parse_layout
from tools.throughput.measure import merged_config

WARM_STEPS = 4


@dataclass(frozen=True)
class TimerCost:
    """Median CPU seconds of one rank's step."""

    without: float
    timed: float
    steps_timed: int


def measure(path: str, layout_text: str, rounds: int, out: str) -> TimerCost:
    recipe = load_recipe(path)
    layout, data = parse_layout(layout_text)
    sizes = derive_sizes(recipe, layout, layout.tensor * layout.pipeline * data)
    trainer = build_recipe_trainer(recipe, layout, merged_config(recipe, sizes))
    grid = trainer.grid
    writer = TimingWriter(Path(out), grid.rank, {})
    shape = (recipe.batch.micro_seqs, recipe.batch.seq_len + 1)
    generator = torch.Generator().manual_seed(0)
    vocab = recipe.model.vocab_size
    micro_batches = [torch.randint(vocab, shape, generator=generator) for _ in range(sizes.accumulation)]
    seconds: dict[bool, list[float]] = {False: [], True: []}
    steps_timed = 0
    CLOCK.start(grid, grid.device, grid.timed_groups())
    for step in range(1, WARM_STEPS + 2 * rounds + 1):
        timed = bool((step - 1 + (step - 1) // 2) % 2)  # off on, on off, ...
        began = time.thread_time()
        if timed:
            CLOCK.begin_step(step)
        trainer.train_step(micro_batches, 1e-4, sizes.tokens_per_step)
        CLOCK.end_step()
        for times in CLOCK.taken():
            writer.step(times)
            steps_timed += 1
        if step > WARM_STEPS:
            seconds[timed].append(time.thread_time() - began)
    return TimerCost(statistics.median(seconds[False]), statistics.median(seconds[True]), steps_timed)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.timers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("recipe", nargs="?", default=str(ROOT / "recipes" / "quickstart.py"), metavar="RECIPE")
    parser.add_argument("--layout", default="tensor=2,pipeline=2", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=40, help="steps of each kind (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, nothing else there")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    if args.rounds < 1:
        raise UsageError(f"--rounds={args.rounds}: must be 1 or more")
    try:
        layout, data = parse_layout(args.layout)
    except RecipeError as error:
        raise UsageError(str(error)) from error
    world = layout.tensor * layout.pipeline * data
    with tempfile.TemporaryDirectory() as out:
        ranks = run_ranks(measure, world, args.recipe, args.layout, args.rounds, out, timeout_seconds=3600.0)
    if args.json:
        print(json.dumps({"ranks": [asdict(cost) for cost in ranks]}))
        return GOOD
    rows = []
    for rank, cost in enumerate(ranks):
        rows.append([rank, f"{1e3 * cost.without:.2f}", f"{1e3 * cost.timed:.2f}", f"{cost.timed / cost.without - 1:+.2%}"])
    print(table(rows, ["rank", "CPU ms a step", "with timers", "cost"]))
    return GOOD


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
