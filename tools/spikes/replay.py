"""`spikes replay RUN STEP`: computes a step again from the checkpoint before it, with the training code itself.

The steps between are computed with the batches and learning rates that the run logged. Losses and gradient norms are compared
with the log: bit for bit in the run's own layout and number of ranks, else to rounding. The run directory is only read.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipes.common.checkpoint.reader import Reader
from recipes.common.checkpoint.resume import load_state
from recipes.common.checks.context_checks import context_problems
from recipes.common.checks.model_checks import depth_problems
from recipes.common.checks.recipe_checks import option_problems
from recipes.common.config.ds_config import merge_ds_config
from recipes.common.config.json_files import laid_out, read_json
from recipes.common.data.batches import open_train, step_micro_batches
from recipes.common.data.reading import Order
from recipes.common.engine.build_trainer import build_recipe_trainer
from recipes.common.parallel.dropout import seed_dropout
from recipes.common.recipe import Layout, Recipe, RecipeError, derive_sizes
from recipes.common.run_dir.metrics import read_metrics
from tools.common.console import FAILED, GOOD, UsageError, printable, table
from tools.common.forked_ranks import RankError, run_ranks
from tools.common.recipe_io import parse_layout, read_recipe
from tools.data.lookup import read_run
from tools.spikes.batch import checkpoint_before
from tools.spikes.evidence.case import expected

RANKS_AT_MOST = 8  # on one machine, unless --layout asks for more
ROUNDING = 1e-3  # relative: fp32 in another layout agrees to 1e-6, bf16 to about this
STANDS_OUT = 4.0  # robust spreads above the usual loss: an event
GONE = 0.5  # share of the excess: with less left, the event has gone away


@dataclass(frozen=True)
class ReplayPlan:
    """Steps (start, stop] of a run from one checkpoint, for the ranks to compute."""

    recipe: Recipe
    layout: Layout
    world_size: int
    ds_config: dict[str, Any]
    checkpoint: str
    skips: tuple[tuple[int, int], ...]
    order: Order  # of reading, since its last change
    steps: tuple[dict[str, Any], ...]  # the records of metrics.jsonl from the checkpoint to the step
    other_batch_at: int | None = None  # sequences consumed, for the last step instead of its own
    device: str = "cpu"


@dataclass(frozen=True)
class Replayed:
    """The numbers of one trial."""

    what: str  # "same batch", "other batch", "fp32"
    losses: list[float]  # of every step from the checkpoint on
    grad_norms: list[float]
    bitwise_comparable: bool


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("step", type=int, metavar="STEP", help="counts from 1, as in metrics.jsonl")
    parser.add_argument("--other-batch", action="store_true", help="also: another batch at that step")
    parser.add_argument("--fp32", action="store_true", help="also: all steps since the checkpoint in fp32")
    parser.add_argument("--layout", metavar="tensor=2,data=2", help="default: the run's own, or one process if it had over 8")


def run(flags: argparse.Namespace) -> int:
    found = replay_step(flags.run, flags.step, other_batch=flags.other_batch, fp32=flags.fp32, layout=flags.layout)
    if flags.json:
        print(json.dumps(found))
    else:
        print(printable(_report(found)))
    return GOOD if found["reproducible"] else FAILED


def replay_step(
    folder: Path, step: int, *, other_batch: bool = False, fp32: bool = False, layout: str | None = None
) -> dict[str, Any]:
    """Replay a step and judge it. Raises UsageError where the run cannot be replayed."""
    plan, own_layout = make_plan(folder, step, layout)
    trials = [("same batch", plan)]
    if other_batch:
        trials.append(("other batch", _with_other_batch(plan)))
    if fp32:
        trials.append(("fp32", _in_fp32(plan, folder)))
    results = []
    for what, trial in trials:
        try:
            losses, norms = run_ranks(_replay_rank, trial.world_size, trial, timeout_seconds=24 * 3600.0)[0]
        except RankError as error:
            raise UsageError(f"{folder}: the steps after {plan.checkpoint} cannot be computed here: {error}") from error
        results.append(Replayed(what, losses, norms, own_layout and what == "same batch"))
    return _judge(folder, plan, results)


def make_plan(folder: Path, step: int, layout: str | None) -> tuple[ReplayPlan, bool]:
    """Return (what to compute, whether it is in the run's own layout)."""
    recipe = read_recipe(folder)
    records = {r["step"]: r for r in read_metrics(folder) if "loss" in r}
    checkpoint = checkpoint_before(folder, step)
    if step not in records:
        raise UsageError(
            f"{folder}: metrics.jsonl has no step {step}; it has {min(records, default=0)} to {max(records, default=0)}"
        )
    if checkpoint is None:
        raise UsageError(f"{folder}: no checkpoint before step {step}")
    first = Reader(checkpoint).state["step"] + 1
    missing = [s for s in range(first, step + 1) if s not in records]
    if missing:
        raise UsageError(f"{folder}: metrics.jsonl lacks step {missing[0]}, between {checkpoint.name} and step {step}")
    with laid_out(folder / "run.json"):
        start = [entry for entry in read_json(folder / "run.json")["starts"] if (entry["resumed_step"] or 0) < step][-1]
        stated = {"layers_per_stage": tuple(start["layout"]["layers_per_stage"])}  # a list in JSON
        own, own_world = Layout(**start["layout"] | stated), start["world_size"]
    chosen, world = _layout(layout, own, own_world, recipe)
    ds_config = _merged(recipe, chosen, world, read_json(folder / "deepspeed.json"))
    plan = ReplayPlan(
        recipe=recipe,
        layout=chosen,
        world_size=world,
        ds_config=ds_config,
        checkpoint=str(checkpoint),
        skips=read_run(folder, step).skips,
        order=read_run(folder, step).order,
        steps=tuple(records[s] for s in range(first, step + 1)),
        device="cuda" if os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.device_count() >= world else "cpu",
    )
    return plan, (chosen, world) == (own, own_world)


def _layout(words: str | None, own: Layout, own_world: int, recipe: Recipe) -> tuple[Layout, int]:
    if words is None:
        alone = Layout(recompute=own.recompute, recompute_every=own.recompute_every)
        return (own, own_world) if own_world <= RANKS_AT_MOST else (alone, 1)
    try:
        layout, data = parse_layout(words)
    except RecipeError as error:
        raise UsageError(str(error)) from error
    depth = recipe.model.get_text_config().num_hidden_layers
    problems = option_problems(layout, recipe.batch.seq_len, "--layout: ") or depth_problems(layout, depth)
    if not problems and layout.context > 1:  # in a rank of its own, like all tensor code
        problems = run_ranks(context_problems, 1, recipe, layout)[0]
    if problems:
        raise UsageError(f"--layout={words}: {'; '.join(problems)}")
    return layout, layout.tensor * layout.pipeline * data


def _merged(recipe: Recipe, layout: Layout, world: int, saved: dict[str, Any]) -> dict[str, Any]:
    """Return the run's own DeepSpeed configuration with the sizes of another layout."""
    sizes = derive_sizes(recipe, layout, world)
    if recipe.batch.global_seqs % (recipe.batch.micro_seqs * sizes.readers):
        raise UsageError(
            f"--layout: {sizes.readers} data ranks of micro_seqs={recipe.batch.micro_seqs} do not divide "
            f"global_seqs={recipe.batch.global_seqs}"
        )
    return merge_ds_config(saved, recipe, sizes, sizes.accumulation)


def _with_other_batch(plan: ReplayPlan) -> ReplayPlan:
    """Let the last step read sequences as far ahead as the run has consumed: none that it had read."""
    return replace(plan, other_batch_at=2 * plan.steps[-1]["consumed_seqs"])


def _in_fp32(plan: ReplayPlan, folder: Path) -> ReplayPlan:
    low = {"bf16", "fp16", "data_types", "communication_data_type"} & plan.ds_config.keys()
    if not {"bf16", "fp16"} & low:
        raise UsageError(f"--fp32: {folder} was trained in fp32")
    return replace(plan, ds_config={name: value for name, value in plan.ds_config.items() if name not in low})


def _replay_rank(plan: ReplayPlan) -> tuple[list[float], list[float]]:
    """Compute the losses and gradient norms of the plan's steps, on every rank."""
    trainer = build_recipe_trainer(plan.recipe, plan.layout, plan.ds_config, plan.device, draw=False)
    load_state(Reader(Path(plan.checkpoint)), trainer)
    recipe, grid = plan.recipe, trainer.grid
    stream = open_train(recipe.data, recipe.batch.seq_len, plan.order)
    losses, norms = [], []
    for record in plan.steps:
        seqs = record["tokens"] // recipe.batch.seq_len
        consumed = record["consumed_seqs"] - seqs
        if plan.other_batch_at is not None and record is plan.steps[-1]:
            consumed = plan.other_batch_at
        trainer.set_global_seqs(seqs)
        seed_dropout(recipe.seed, record["step"], grid)
        micro_batches = step_micro_batches(
            stream,
            seed=recipe.seed,
            consumed=consumed,
            global_seqs=seqs,
            micro_seqs=recipe.batch.micro_seqs,
            data_rank=grid.reader,
            data_size=grid.readers,
            skips=plan.skips,
        )
        ceiling = 0.0 if record.get("skip_reason") else math.inf  # a step that the run skipped is skipped again
        result = trainer.train_step(micro_batches, record["lr"], record["tokens"], norm_ceiling=ceiling)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    return losses, norms


def _judge(folder: Path, plan: ReplayPlan, results: list[Replayed]) -> dict[str, Any]:
    step, same = plan.steps[-1]["step"], results[0]
    different = _differences(plan, same)
    judged = {at: d for at, d in different.items() if same.bitwise_comparable or d > ROUNDING}
    usual, spread = _usual_loss(folder, step)
    logged = plan.steps[-1]
    excess = logged["loss"] - usual
    verdicts = [_reproduced(judged, step, plan, same.bitwise_comparable)]
    for other in results[1:]:
        if not excess > STANDS_OUT * spread:
            verdicts.append(f"{other.what}: the loss of this step is as usual: there is no excess to go away")
            continue
        left = (other.losses[-1] - usual) / excess
        verdicts.append(_CONCLUSIONS[other.what, left < GONE].format(left=left, loss=other.losses[-1], excess=excess))
    return {
        "run": str(folder),
        "step": step,
        "checkpoint": plan.checkpoint,
        "ranks": plan.world_size,
        "usual_loss": usual,
        "logged": {"loss": logged["loss"], "grad_norm": logged["grad_norm"]},
        "replayed": {r.what: {"loss": r.losses[-1], "grad_norm": r.grad_norms[-1]} for r in results},
        "bitwise": same.bitwise_comparable and not different,
        "reproducible": not any(d > ROUNDING for d in different.values()),
        "first_different_step": min(judged, default=None),
        "verdicts": verdicts,
    }


def _differences(plan: ReplayPlan, same: Replayed) -> dict[int, float]:
    """Return step -> largest relative difference of loss and gradient norm from the log, for steps that differ."""
    found = {}
    for record, loss, norm in zip(plan.steps, same.losses, same.grad_norms, strict=True):
        difference = max(_relative(record["loss"], loss), _relative(record["grad_norm"], norm))
        if difference:
            found[record["step"]] = difference
    return found


_CONCLUSIONS = {
    ("other batch", True): "goes away with another batch (loss {loss:.4f}): the data of this step",
    ("other batch", False): "stays with another batch (loss {loss:.4f}, {left:.0%} of the excess of {excess:+.3f}): not the data "
    "of this step, but the weights and the optimizer's state before it",
    ("fp32", True): "goes away in fp32 (loss {loss:.4f}): precision",
    ("fp32", False): "stays in fp32 (loss {loss:.4f}, {left:.0%} of the excess of {excess:+.3f}): not precision",
}


def _reproduced(different: dict[int, float], step: int, plan: ReplayPlan, bitwise: bool) -> str:
    first = plan.steps[0]["step"]
    if not different:
        how = "bit for bit" if bitwise else f"to {ROUNDING:g} (another layout than the run's: not bitwise)"
        return f"reproducible: steps {first} to {step} are {how} as logged; data or dynamics, not hardware"
    at, most = min(different), max(different.values())
    source = f"what {Path(plan.checkpoint).name}, the data and the schedule give"
    if most <= ROUNDING:
        return (
            f"reproducible to rounding, not bit for bit: from step {at} on the log differs by up to {most:.1e} from {source}; "
            "nondeterministic kernels or another version of a library explain that"
        )
    return (
        f"not reproducible: step {at} is the first whose loss or gradient norm is not {source} (by {different[at]:.1e}, later up "
        f"to {most:.1e}); hardware suspect, or code, data or versions changed since the run"
    )


def _relative(a: float, b: float) -> float:
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    return abs(a - b) / max(abs(a), abs(b)) if math.isfinite(a) and math.isfinite(b) else math.inf


def _usual_loss(folder: Path, step: int) -> tuple[float, float]:
    """Return (this step's loss without an event, as extrapolated from the steps before, and their robust spread)."""
    records = [r for r in read_metrics(folder) if "loss" in r and r["step"] <= step]
    steps, losses = np.array([r["step"] for r in records]), np.array([float(r["loss"]) for r in records])
    return expected(steps, losses, len(steps) - 1)


def _report(found: dict[str, Any]) -> str:
    logged = found["logged"]
    rows = [["logged", f"{logged['loss']:.9g}", f"{logged['grad_norm']:.9g}"]]
    rows += [[what, f"{r['loss']:.9g}", f"{r['grad_norm']:.9g}"] for what, r in found["replayed"].items()]
    where = f"step {found['step']} from {found['checkpoint']} on {found['ranks']} ranks; usual loss {found['usual_loss']:.4f}"
    return "\n".join([where, table(rows, ["", "loss", "gradient norm"]), *found["verdicts"]])
