"""What the timers cost: CPU time of steps with the clock running against steps with it standing still, in turns.

    python -m tests.bench.timers [--layout tensor=2,pipeline=2] [--rounds 40]

CPU time of the rank's own thread, so that waiting for others and what else the machine does count little; medians of pairs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from recipes.common.engine.build_trainer import build
from recipes.common.recipe import derive_sizes
from recipes.common.run_dir.timing_files import TimingWriter
from recipes.common.runtime.step_clock import CLOCK
from tools.common.forked_ranks import run_ranks
from tools.common.recipe_io import load_recipe, parse_layout
from tools.throughput.measure import merged_config


def measure(path: str, layout_text: str, rounds: int, out: str) -> tuple[float, float, int]:
    """(median CPU seconds of a step without, with, spans a step) of this rank."""
    recipe = load_recipe(path)
    layout, data = parse_layout(layout_text)
    sizes = derive_sizes(recipe, layout, layout.tensor * layout.pipeline * data)
    grid, trainer = build(recipe, layout, merged_config(recipe, sizes))
    writer = TimingWriter(Path(out), grid.rank, {})
    shape = (recipe.batch.micro_seqs, recipe.batch.seq_len + 1)
    generator = torch.Generator().manual_seed(0)
    vocab = recipe.model.vocab_size
    micro_batches = [torch.randint(vocab, shape, generator=generator) for _ in range(sizes.accumulation)]
    seconds: dict[bool, list[float]] = {False: [], True: []}
    CLOCK.start(grid, grid.device)
    for step in range(1, 2 * rounds + 1):
        timed = bool((step + step // 2) % 2)  # off on, on off, ...
        began = time.thread_time()
        if timed:
            CLOCK.begin_step(step)
        trainer.train_step(micro_batches, 1e-4, sizes.tokens_per_step)
        CLOCK.end_step()
        spans = 0
        for times in CLOCK.taken():
            writer.step(times)
            spans = len(times.talks)
        if step > 4:
            seconds[timed].append(time.thread_time() - began)
    return statistics.median(seconds[False]), statistics.median(seconds[True]), spans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="recipes/quickstart.py")
    parser.add_argument("--layout", default="tensor=2,pipeline=2")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", default="/tmp/bench_timers")
    flags = parser.parse_args()
    layout, data = parse_layout(flags.layout)
    world = layout.tensor * layout.pipeline * data
    ranks = run_ranks(measure, world, flags.recipe, flags.layout, flags.rounds, flags.out, timeout_seconds=3600.0)
    for rank, (without, with_timers, _) in enumerate(ranks):
        share = 100 * (with_timers / without - 1)
        print(f"rank {rank}: CPU ms a step {1e3 * without:.2f} without, {1e3 * with_timers:.2f} with timers: {share:+.2f} %")


if __name__ == "__main__":
    main()
