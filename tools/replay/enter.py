"""Finds what a step of a run was computed from: the checkpoint before it, and the recipe, layout and order of data of that time.

Everything that the loop derives from its position (learning rate, batch size, which sequences) is derived again, so that a replay
is the loop without its files. Only what no one can derive is taken from the log: where reading stood, and which steps the run
decided to skip. The run is only read; it may be alive.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recipes.common.anomalies.rewinds import Rewind, read_history
from recipes.common.checkpoint.position import RunPosition
from recipes.common.checkpoint.reader import Reader
from recipes.common.config.ds_config import merge_ds_config
from recipes.common.config.fact_effects import CHANGES_LOSS, effect_of_package
from recipes.common.config.json_files import JsonError, laid_out, read_json
from recipes.common.recipe import Layout, Recipe, derive_sizes
from recipes.common.run_dir.checkpoint_folders import checkpoint_step, newest_before, sealed_checkpoints
from recipes.common.run_dir.metrics import read_metrics
from recipes.common.run_dir.run_files import recipe_to_dict
from recipes.common.run_dir.tensor_stats import Stats, read_stats
from tools.common.console import UsageError
from tools.common.recipe_io import read_recipe_file
from tools.common.run_record import open_record
from tools.data.lookup import file_at, read_run
from tools.replay.whole_shapes import Dims


@dataclass(frozen=True, kw_only=True)
class ReplayPlan:
    """Steps (position.step, last_step] of a run, for ranks to compute again. Plain data: ranks of any release can be given it."""

    run: str
    recipe: Recipe
    layout: Layout
    world_size: int
    ds_config: dict[str, Any]
    checkpoint: str | None  # None: from the initial weights
    position: RunPosition  # where reading stands before the first of the steps
    last_step: int
    skipped_steps: frozenset[int]  # steps whose update the run did not apply
    history: tuple[Rewind, ...]  # rewinds, for their learning rates
    device: str = "cpu"
    threads: int = 1  # of a rank: a sum over more is added up in another order
    other_batch_at: int | None = None  # sequences consumed before the last step, in place of its own
    stir: int | None = None  # move every weight to a neighbouring number, up or down as this seed draws, before the first step
    trace_step: int | None = None  # fingerprint every tensor of this step
    watch: tuple[str, ...] = ()  # of the traced step, give these tensors whole
    shapes: Mapping[tuple[str, str], Dims] | None = None  # see `whole_shapes`; None: a rank that traces works them out

    @property
    def first_step(self) -> int:
        return self.position.step + 1

    @property
    def come_from(self) -> str:
        return "the initial weights" if self.checkpoint is None else Path(self.checkpoint).name


@dataclass(frozen=True, kw_only=True)
class LoggedSteps:
    """What a run wrote of the steps of a plan, and what it ran on."""

    records: dict[int, dict[str, Any]]  # step -> its line of metrics.jsonl
    stats: Stats | None  # of those steps; None where the run kept none
    layout: Layout
    world_size: int
    versions: dict[str, str]  # of the packages that can change a number, as recorded
    device: str  # its name


def enter(folder: Path, step: int, *, beginning: tuple[int, str | None] | None = None) -> tuple[ReplayPlan, LoggedSteps]:
    """Return how to compute a step of a run again as the run did, and what the run wrote of it.

    beginning: (step, checkpoint): begin with another run's state after that step, in place of the run's own before `step`.
    Raises UsageError where the run cannot say, JsonError and CheckpointError for a damaged file.
    """
    if not (folder / "recipe.json").is_file():
        raise UsageError(f"{folder} is no run directory: it has no recipe.json")
    records = {r["step"]: r for r in _metrics(folder) if "loss" in r}
    if step not in records:
        raise UsageError(
            f"{folder}: metrics.jsonl has no step {step}; it has {min(records, default=0)} to {max(records, default=0)}"
        )
    start, end = _start_of(folder, step)
    checkpoint = newest_before(folder, step)
    begins = 0 if checkpoint is None else checkpoint_step(checkpoint)
    if beginning is not None:
        begins, checkpoint = beginning[0], None if beginning[1] is None else Path(beginning[1])
    elif checkpoint is None and _starts(folder)[0]["resumed_step"] is not None:
        raise UsageError(f"{folder}: no checkpoint before step {step}, and the run began with one; replay a later step")
    missing = [s for s in range(begins + 1, step + 1) if s not in records]
    if missing:
        raise UsageError(f"{folder}: metrics.jsonl lacks step {missing[0]}, between step {begins} and step {step}")
    recipe = read_recipe_file(recipe_file(folder, step, (start["resumed_step"] or 0, end)))
    _check_one_recipe(folder, recipe, begins, start)
    with laid_out(folder / "run.json"):
        stated = {"layers_per_stage": tuple(start["layout"]["layers_per_stage"])}  # a list in JSON
        layout, world_size = Layout(**start["layout"] | stated), int(start["world_size"])
    sizes = derive_sizes(recipe, layout, world_size)
    first, facts = records[begins + 1], _facts(folder, step)
    plan = ReplayPlan(
        run=str(folder),
        recipe=recipe,
        layout=layout,
        world_size=world_size,
        ds_config=merge_ds_config(read_json(file_at(folder, "deepspeed", step)), recipe, sizes, sizes.accumulation),
        checkpoint=None if checkpoint is None else str(checkpoint),
        position=_position(folder, recipe, begins, step, first, checkpoint),
        last_step=step,
        skipped_steps=frozenset(s for s in range(begins + 1, step + 1) if records[s].get("skip_reason")),
        history=read_history(folder),
        device=choose_device(world_size),
        threads=_threads(facts),
    )
    logged = LoggedSteps(
        records={s: records[s] for s in range(begins + 1, step + 1)},
        stats=_stats(folder, begins + 1, step),
        layout=layout,
        world_size=world_size,
        versions=_versions(facts),
        device=_device(facts),
    )
    return plan, logged


def choose_device(world_size: int) -> str:
    """Return "cuda" where there is one for each rank and this process may use them."""
    return "cuda" if os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.device_count() >= world_size else "cpu"


def recipe_file(folder: Path, step: int, part: tuple[int, float]) -> Path:
    """Return the file with the recipe under which `step` was trained. part: the start that did it began after part[0] and made
    the steps up to part[1].

    A checkpoint that the same start saved has it for certain; else it is the one that a later resume put aside.
    """
    for checkpoint in sealed_checkpoints(folder):
        if part[0] < checkpoint_step(checkpoint) <= part[1] and (checkpoint / "recipe.json").is_file():
            return checkpoint / "recipe.json"
    return file_at(folder, "recipe", step)


def _starts(folder: Path) -> Sequence[Mapping[str, Any]]:
    path = folder / "run.json"
    if not path.is_file():
        raise UsageError(f"{folder} has no run.json, which says how the run was started")
    with laid_out(path):
        starts = read_json(path)["starts"]
        if not starts or any(s["resumed_step"] is not None and type(s["resumed_step"]) is not int for s in starts):
            raise ValueError("its starts are not")
    return starts


def _start_of(folder: Path, step: int) -> tuple[Mapping[str, Any], float]:
    """Return the start that computed `step` as it is in the log, and the last step that it can have computed there.

    A later start that went back to before the step would have moved it aside.
    """
    starts = _starts(folder)
    with laid_out(folder / "run.json"):
        number = [n for n, start in enumerate(starts) if (start["resumed_step"] or 0) < step][-1]
        later = [start["resumed_step"] or 0 for start in starts[number + 1 :]]
    return starts[number], min(later, default=math.inf)


def _check_one_recipe(folder: Path, recipe: Recipe, begins: int, start: Mapping[str, Any]) -> None:
    """Refuse to go through a resume that changed the recipe: the weights there are in no checkpoint any more."""
    resumed = start["resumed_step"] or 0
    if begins >= resumed:
        return
    for step in range(begins + 1, resumed + 1):
        earlier, end = _start_of(folder, step)
        other = read_recipe_file(recipe_file(folder, step, (earlier["resumed_step"] or 0, end)))
        if recipe_to_dict(other) != recipe_to_dict(recipe):
            raise UsageError(
                f"{folder}: the checkpoint of step {resumed}, where the run resumed with another recipe, is gone; replay a step "
                f"up to {resumed}, or one after the next checkpoint"
            )


def _facts(folder: Path, step: int) -> Mapping[str, Any]:
    """Return what is recorded of the machine and the packages that computed a step; nothing where the record is damaged."""
    try:
        segment = open_record(str(folder)).at(step)
    except JsonError:
        return {}
    return segment.facts if segment is not None else {}


def _threads(facts: Mapping[str, Any]) -> int:
    """Return how many threads a rank had; one, as the launchers set it, where the record does not say."""
    threads = facts.get("threads.torch")
    return threads if type(threads) is int and threads >= 1 else 1


def _versions(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return the versions of the packages that can change a number."""
    named = {name.split(".")[1]: version for name, version in facts.items() if re.fullmatch(r"package\.[^.]+\.version", name)}
    return {name: str(version) for name, version in named.items() if version and effect_of_package(name) in CHANGES_LOSS}


def _device(facts: Mapping[str, Any]) -> str:
    gpus = facts.get("host.0.gpus")
    return str(gpus[0] if isinstance(gpus, list) and gpus else facts.get("host.0.cpu") or "a machine that is not recorded")


def _position(
    folder: Path, recipe: Recipe, begins: int, step: int, first: Mapping[str, Any], checkpoint: Path | None
) -> RunPosition:
    """Return where reading stood before the first step: by the log, in the order under which the step was read."""
    read = read_run(folder, step)
    with laid_out(folder / "metrics.jsonl"):
        consumed = int(first["consumed_seqs"]) - int(first["tokens"]) // recipe.batch.seq_len
    skipped = 0 if checkpoint is None else int(Reader(checkpoint).state["skipped_steps"])
    return RunPosition(step=begins, consumed_seqs=consumed, skipped_steps=skipped, skips=read.skips, order=read.order)


def _metrics(folder: Path) -> list[dict[str, Any]]:
    try:
        return list(read_metrics(folder, skip_damaged=True))
    except FileNotFoundError:
        raise UsageError(f"{folder} has no metrics.jsonl: the run has logged no step yet") from None


def _stats(folder: Path, first: int, last: int) -> Stats | None:
    try:
        return read_stats(folder, first, last)
    except FileNotFoundError:
        return None
