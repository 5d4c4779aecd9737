"""Trains a small model in a layout and in one process with plain transformers, and compares. What rounding makes is measured."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from recipes.common.checks.context_checks import context_problems
from recipes.common.checks.expert_trial import expert_trial_problems
from recipes.common.checks.family_trials import chunk_problems, partition_problems, sequence_problems
from recipes.common.checks.model_checks import config_problems, depth_problems, value_problems
from recipes.common.checks.precision_checks import fp8_problems, precision_problems
from recipes.common.checks.recipe_checks import optimizer_problems, option_problems
from recipes.common.checks.tiny_trial import trial_problems
from recipes.common.config.ds_checks import ds_config_problems, version_problems
from recipes.common.config.ds_config import ds_config_path, load_ds_config, precision, zero_stage
from recipes.common.model.decoder import PlanError
from recipes.common.parallel.tiny_model import shrink
from recipes.common.recipe import AdamW, Layout, Recipe, RecipeError
from tools.common.dropout import DROPOUTS
from tools.common.forked_ranks import run_ranks
from tools.common.recipe_io import layout_text

with redirect_stdout(sys.stderr):  # DeepSpeed logs on what is stdout when it is imported
    from tools.common.parity import (
        BF16_STEP,
        Outcome,
        Trial,
        gradient_trial,
        outcome,
        train_in_layout,
        train_plain,
        train_stirred,
    )

# In fp32 a bound follows from the model's own rounding: `SAMPLES` times the oracle trains from neighbouring weights, and what
# is allowed is so many times the largest difference that makes, within these limits. Loss and gradient norm are relative,
# gradients and parameters absolute. A gradient norm after steps of Adam may be off by 1e-6 for no other reason
SAMPLES, FACTOR = 3, 4.0
STEP_LIMITS, TENSOR_LIMITS = (4 * 2.0**-23, 1e-5), (1e-6, 1e-4)
# bf16 rounds at 2^-9 and Adam's first steps turn a rounded gradient's sign into a whole step, so parameters may differ by twice
# the distance they can travel, and by their own rounding (half a unit in the last of bf16's 8 places, at the start and in the
# copy that is compared).
LOW_LOSS, LOW_NORM = 2e-3, 5e-2
LOWEST = 2.0  # times these with products in fp8
LOW_ROUNDING = 2 * 2.0**-9
# Products in fp8 pass a small difference on as none, or as a large one: an element that it takes past the middle between two
# numbers moves by an eighth, and others after it. So the gradient as a whole may be as far from the oracle's as that moves when
# its weights are moved as bf16 rounds them
MOST_RANKS, MOST_STEPS, MOST_TOKENS = 256, 1000, 65536


@dataclass(frozen=True)
class WorstDifference:
    """The largest difference in one quantity, and what is allowed."""

    what: str
    where: str  # the parameter or the step of the largest difference
    difference: float
    bound: float
    floor: float | None = None  # what rounding alone made of it; not measured in low precision

    @property
    def passed(self) -> bool:
        return self.difference <= self.bound  # False for NaN


def make_trial(
    recipe: Recipe, layout: Layout, data: int, *, steps: int, seq_len: int, device: str, any_release: bool = False
) -> Trial:
    """Shrink the recipe to a tiny width. Raises RecipeError with everything that rules out a trial.

    any_release: try versions too that a run refuses.
    """
    ds_config = load_ds_config(recipe.deepspeed)
    refused = version_problems(_installed("deepspeed"), torch.__version__)
    if refused and any_release:
        print(*(f"note: a run refuses this release, {problem}" for problem in refused), sep="\n", file=sys.stderr)
    problems = ([] if any_release else refused) + config_problems(recipe.model)
    problems += precision_problems(recipe, ds_config)
    problems += value_problems(recipe.model) + _flag_problems(layout, data, steps, seq_len)
    problems += ds_config_problems(ds_config, ds_config_path(recipe.deepspeed), layout) + optimizer_problems(recipe.optimizer)
    problems += option_problems(layout, seq_len, "--layout: ")
    if problems:  # the model may not even be of a size to shrink
        raise RecipeError(f"recipe {recipe.name!r} in the layout {layout_text(layout, data)}", problems)
    problems += depth_problems(layout, recipe.model.num_hidden_layers)
    layout = replace(layout, layers_per_stage=())  # the tiny model has another number of layers
    try:
        model = without_dropout(shrink(recipe.model, layout))
    except (PlanError, ValueError, TypeError, AttributeError) as error:
        raise RecipeError(f"recipe {recipe.name!r}", [*problems, f"model: cannot be shrunk for the trial: {error}"]) from error
    if not problems and device == "cuda":  # a CPU takes any width
        problems += fp8_problems(replace(recipe, model=model), layout)
    if not problems:  # in a rank of its own, like all tensor code: see tools.common.forked_ranks
        problems += run_ranks(trial_problems, 1, recipe.model, recipe.attention)[0]
        for proof in () if problems else (partition_problems, sequence_problems, chunk_problems, expert_trial_problems):
            problems += run_ranks(proof, 1, recipe.model, layout, recipe.attention)[0]
        problems += run_ranks(context_problems, 1, recipe, layout)[0] if layout.context > 1 else []
    if problems:
        raise RecipeError(f"recipe {recipe.name!r} in the layout {layout_text(layout, data)}", problems)
    return Trial(
        model=model,
        layout=layout,
        world_size=layout.tensor * layout.pipeline * data,
        optimizer=recipe.optimizer,
        deepspeed=ds_config,
        steps=steps,
        seq_len=seq_len,
        global_seqs=4 * data // layout.context,
        z_loss=recipe.z_loss,
        router=recipe.router,
        attention=recipe.attention,
        kernels=recipe.kernels,
        precision=recipe.precision,
        device=device,
    )


def _flag_problems(layout: Layout, data: int, steps: int, seq_len: int) -> list[str]:
    ranks = layout.tensor * layout.pipeline * data
    problems = [f"--{name}={value} must be a whole number from 1 to {most}" for name, value, most in
                (("steps", steps, MOST_STEPS), ("seq-len", seq_len, MOST_TOKENS)) if not 1 <= value <= most]  # fmt: skip
    if ranks > MOST_RANKS:
        problems.append(f"--layout: {ranks} ranks are more processes than a trial starts here, {MOST_RANKS}; use smaller sizes")
    return problems


def without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """Turn dropout off: its random zeros differ between layouts by design; nothing else may."""
    fields = {name: 0.0 for name, value in config.to_dict().items() if name in DROPOUTS and isinstance(value, float)}
    config.update(fields)
    return config


def verify(trial: Trial) -> list[WorstDifference]:
    """Train both sides, in forked ranks, and compare."""
    in_fp32 = gradient_trial(replace(trial, deepspeed=_in_fp32(trial.deepspeed)))
    trials = [trial, replace(in_fp32, precision=None), *([replace(in_fp32, stir=BF16_STEP)] if trial.precision else [])]
    (trained, plain, stirred), gradients, *in_fp8 = _both(trials)
    if precision(trial.deepspeed) == "fp32":
        rows = [
            worst_step("loss", trained.losses, plain.losses, floors=[each.losses for each in stirred]),
            worst_step("gradient norm", trained.grad_norms, plain.grad_norms, floors=[each.grad_norms for each in stirred]),
            worst_tensor("parameter", trained, plain, stirred),
        ]
    else:
        loose = LOWEST if trial.precision else 1.0
        travelled = 2 * trial.steps * trial.optimizer.lr
        rows = [
            worst_step("loss", trained.losses, plain.losses, loose * LOW_LOSS),
            worst_step("gradient norm", trained.grad_norms, plain.grad_norms, loose * LOW_NORM),
            worst_tensor("parameter", trained, plain, [], travelled, LOW_ROUNDING),
        ]
    rows.append(worst_tensor("gradient, fp32", *gradients))
    return [*rows, *(whole_gradient("gradient, fp8", *sides) for sides in in_fp8)]


def _in_fp32(config: dict) -> dict:
    """Return the ds_config without low precision: rounding would hide a scale that is wrong by a few per cent."""
    return {name: block for name, block in config.items() if name not in ("bf16", "fp16")}


def _both(trials: Sequence[Trial]) -> list[tuple[Outcome, Outcome, list[Outcome]]]:
    """Return what the layout makes of each trial, what the oracle does, and, in fp32, what the oracle does with other roundings.

    The ranks of a side are started once for all trials, which takes as long as a training.
    """
    # near-zero gradients are all rounding, and an eps of 1e-8 would scale them up to 1
    trials = [
        replace(trial, optimizer=replace(trial.optimizer, eps=max(trial.optimizer.eps, 1e-5)))
        if isinstance(trial.optimizer, AdamW)
        else trial
        for trial in trials
    ]
    plain = run_ranks(_each, 1, train_plain, trials)[0]
    in_fp32 = [trial for trial in trials if precision(trial.deepspeed) == "fp32"]
    stirred = zip(*run_ranks(_each, SAMPLES, train_stirred, in_fp32), strict=True)
    trained = zip(*run_ranks(_each, trials[0].world_size, train_in_layout, trials), strict=True)
    return [
        (
            outcome(list(ranks), {name: tensor.shape for name, tensor in oracle.parameters.items()}),
            oracle,
            list(next(stirred)) if precision(trial.deepspeed) == "fp32" else [],
        )
        for trial, ranks, oracle in zip(trials, trained, plain, strict=True)
    ]


def _each(train: Callable[[Trial], Any], trials: Sequence[Trial]) -> list[Any]:
    results = []
    for trial in trials:
        gc.collect()  # the trainer before
        results.append(train(trial))
    return results


def _within(floor: float, limits: tuple[float, float]) -> float:
    return min(max(FACTOR * floor, limits[0]), limits[1])


def worst_step(
    what: str, ours: list[float], plain: list[float], bound: float | None = None, floors: Sequence[list[float]] = ()
) -> WorstDifference:
    """Return the step that is furthest beyond its bound, or nearest to it. Each step has its own: roundings add up."""

    def relative(a: float, b: float) -> float:
        return abs(a - b) / max(abs(b), 1e-30)

    rows = []
    for step, (a, b) in enumerate(zip(ours, plain, strict=True)):
        floor = max((relative(each[step], b) for each in floors), default=None)
        allowed = _within(floor, STEP_LIMITS) if bound is None else bound
        rows.append(WorstDifference(what, f"step {step + 1}", relative(a, b), allowed, floor))
    return max(rows, key=lambda row: row.difference / row.bound if row.difference == row.difference else float("inf"))


def worst_tensor(
    what: str, trained: Outcome, oracle: Outcome, stirred: list[Outcome], bound: float | None = None, rounding: float = 0.0
) -> WorstDifference:
    """Return the worst element. rounding: the share of an element by which it may differ in addition to the bound."""
    ours, plain = trained.parameters, oracle.parameters
    floor = max((_largest(each.parameters[n] - plain[n]) for each in stirred for n in plain), default=None)
    allowed = _within(floor, TENSOR_LIMITS) if bound is None else bound
    missing = sorted(set(ours) ^ set(plain))
    if missing:
        return WorstDifference(what, f"{missing[0]} is on one side only", float("nan"), allowed, floor)
    worst = {name: max(_largest(ours[name] - plain[name], rounding * plain[name].abs()), 0.0) for name in plain}
    name = max(worst, key=lambda n: worst[n] if worst[n] == worst[n] else float("inf"))
    return WorstDifference(what, name, worst[name], allowed, floor)


def whole_gradient(what: str, trained: Outcome, oracle: Outcome, stirred: list[Outcome]) -> WorstDifference:
    """Return the norm of what a step at rate 1 changes otherwise, as a share of the gradient's."""
    floor = max(_distance(each, oracle) for each in stirred)
    return WorstDifference(what, "all of it, relative", _distance(trained, oracle), floor, floor)


def _distance(trained: Outcome, oracle: Outcome) -> float:
    parts = [(trained.parameters[name] - plain).double().square().sum() for name, plain in oracle.parameters.items()]
    return sum(parts).item() ** 0.5 / oracle.grad_norms[0]


def _largest(difference: torch.Tensor, rounding: torch.Tensor | float = 0.0) -> float:
    return (difference.abs() - rounding).max().item()


def _installed(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def gate_table(name: str, trial: Trial, rows: list[WorstDifference]) -> str:
    lines = [
        f"{name}: {type(trial.model).__name__} at hidden size {trial.model.hidden_size}, tensor {trial.layout.tensor} x "
        f"pipeline {trial.layout.pipeline} x data {trial.data}{_shared(trial.layout)}, {precision(trial.deepspeed)}, "
        f"ZeRO {zero_stage(trial.deepspeed)}, {trial.steps} steps, against one process of plain transformers",
        f"{'':16}{'largest difference':>20}{'allowed':>12}{'rounding':>12}  where",
    ]
    for row in rows:
        verdict = "" if row.passed else "   <-- FAILED"
        floor = "-" if row.floor is None else f"{row.floor:.1e}"
        lines.append(f"{row.what:<16}{row.difference:>20.1e}{row.bound:>12.1e}{floor:>12}  {row.where}{verdict}")
    return "\n".join(lines)


def _shared(layout: Layout) -> str:
    """Say what data ranks share."""
    said = [f"{name} {getattr(layout, name)}" for name in ("context", "expert") if getattr(layout, name) > 1]
    return f" ({', '.join(said)})" if said else ""
