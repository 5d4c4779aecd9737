"""`run RECIPE`: times steps of a recipe on this machine, in forked ranks, and reports where their time went.

It takes the step of `recipes.common.train` without evaluation, monitor and checkpoints, on the recipe's data or random tokens,
and traces the last steps.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from recipes.common.checks.recipe_checks import check_recipe
from recipes.common.config.ds_config import load_ds_config, merge_ds_config
from recipes.common.config.lr_schedules import learning_rate_at
from recipes.common.engine.build_trainer import build_recipe_trainer
from recipes.common.engine.startup import use_accelerator
from recipes.common.monitor.phases import Phases
from recipes.common.recipe import Layout, Recipe, RecipeError, Sizes, derive_sizes
from recipes.common.run_dir.run_files import recipe_to_dict, write_run_files
from recipes.common.train import open_reader
from tools.common.console import UsageError, quiet_transformers
from tools.common.forked_ranks import RankError, run_ranks
from tools.common.recipe_io import load_recipe, parse_layout
from tools.throughput import report
from tools.throughput.step_memory import count_step
from tools.throughput.timings import WARM_STEPS

TRACED_STEPS = 2


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe file")
    parser.add_argument("--layout", default="data=1", help="tensor=2,pipeline=2,data=2,... (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help=f"timed, after {WARM_STEPS} to warm up (default: %(default)s)")
    parser.add_argument(
        "--micro-batches", type=int, metavar="N", help="micro batches a step and data rank (default: the recipe's)"
    )
    parser.add_argument("--random-tokens", action="store_true", help="random tokens instead of the recipe's data")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda needs one GPU a rank (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="run directory (default: runs/throughput_RECIPE)")
    report.add_output_flags(parser)


def run(flags: argparse.Namespace) -> int:
    if flags.steps < 1:
        raise UsageError(f"--steps={flags.steps}: must be 1 or more")
    if flags.micro_batches is not None and flags.micro_batches < 1:
        raise UsageError(f"--micro-batches={flags.micro_batches}: must be 1 or more")
    quiet_transformers()
    recipe = load_recipe(flags.recipe)
    layout, data = parse_layout(flags.layout)
    world = layout.tensor * layout.pipeline * data
    if flags.device == "cuda" and torch.cuda.device_count() < world:
        raise UsageError(f"--device=cuda: {flags.layout} needs {world} GPUs, this machine has {torch.cuda.device_count()}")
    use_accelerator(flags.device)
    batch = replace(recipe.batch, ramp=())
    if flags.micro_batches:
        batch = replace(batch, global_seqs=flags.micro_batches * data // layout.context * batch.micro_seqs)
    recipe = replace(recipe, batch=batch, layouts={world: layout})
    problems = run_ranks(_problems, 1, recipe, world, not flags.random_tokens)[0]  # in a forked rank, like all computing
    if problems:
        raise RecipeError(f"recipe {recipe.name!r} in the layout {flags.layout}", problems)
    out_dir = (flags.out or Path("runs") / f"throughput_{recipe.name}").expanduser().resolve()
    last = WARM_STEPS + flags.steps
    trace_steps = range(max(last - TRACED_STEPS, WARM_STEPS) + 1, last + 1)
    print(f"{last} steps on {world} ranks; timing in {out_dir}", file=sys.stderr)
    try:
        run_ranks(train_steps, world, recipe, str(out_dir), last, trace_steps, flags.random_tokens, timeout_seconds=3600.0)
    except RankError as error:
        raise UsageError(f"{flags.recipe} did not run in {flags.layout}: {error}") from error
    return report.show(out_dir, flags)


def _problems(recipe: Recipe, world: int, here: bool) -> list[str]:
    try:
        check_recipe(recipe, world, check_machine=here)
    except RecipeError as error:
        return error.problems
    return []


def train_steps(recipe: Recipe, out_dir: str, steps: int, trace_steps: range, random_tokens: bool) -> float:
    """Train with timing below `out_dir`, on every rank; return the last loss."""
    world, rank, out = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]), Path(out_dir)
    layout: Layout = recipe.layouts[world]
    sizes = derive_sizes(recipe, layout, world)
    ds_config = merged_config(recipe, sizes)
    phases = Phases(out, rank, trace_steps)
    trainer = build_recipe_trainer(recipe, layout, ds_config)
    if rank == 0:
        write_run_files(out, recipe_to_dict(recipe), ds_config, layout=layout, sizes=sizes)
    phases.start(trainer)
    reader = None if random_tokens else open_reader(recipe, trainer.grid, ())
    generator = torch.Generator().manual_seed(recipe.seed + trainer.grid.reader)
    shape = (recipe.batch.micro_seqs, recipe.batch.seq_len + 1)
    vocab, seqs, loss = recipe.model.get_text_config().vocab_size, recipe.batch.global_seqs, float("nan")
    for step in range(1, steps + 1):
        phases.enter(step, "data")
        if reader is None:
            micro_batches = [torch.randint(vocab, shape, generator=generator) for _ in range(sizes.accumulation)]
        else:
            micro_batches = reader.next((step - 1) * seqs, seqs)
        lr = learning_rate_at(recipe, step, step * sizes.tokens_per_step)
        phases.enter(step, "step")
        with count_step(trainer) if step == 1 else nullcontext({}) as inside:
            loss = trainer.train_step(micro_batches, lr, sizes.tokens_per_step).loss
        phases.add_memory(inside)
        phases.enter(step, "log")
        if rank == 0 and sys.stderr.isatty():
            print(f"\rstep {step} of {steps}", end="\n" if step == steps else "", file=sys.stderr)
    phases.enter(steps, "end")
    if reader is not None:
        reader.close()
    return loss


def merged_config(recipe: Recipe, sizes: Sizes) -> dict[str, Any]:
    """Return the config that DeepSpeed gets for `recipe` at these sizes."""
    return merge_ds_config(load_ds_config(recipe.deepspeed), recipe, sizes, sizes.accumulation)
