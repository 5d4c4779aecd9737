"""Computes the steps of a plan with the training code itself, on ranks of this machine: the loop of a run, without its files."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipes.common.anomalies.rewinds import lr_factor_at
from recipes.common.checkpoint.files import CheckpointError, damage
from recipes.common.checkpoint.reader import Reader
from recipes.common.checkpoint.resume import load_state
from recipes.common.config.lr_schedules import global_seqs_at, learning_rate_at
from recipes.common.data.batches import open_train, step_micro_batches
from recipes.common.engine import zero_state
from recipes.common.engine.build_trainer import build_recipe_trainer
from recipes.common.engine.trainer import StepResult, Trainer
from recipes.common.monitor.parameter_stats import ParameterStats
from recipes.common.parallel.dropout import seed_dropout
from recipes.common.recipe import ROOT, Recipe, due
from recipes.common.run_dir.checkpoint_folders import step_folder
from recipes.common.run_dir.run_files import recipe_to_dict
from recipes.common.train import step_record
from tools.common.console import CheckError
from tools.common.forked_ranks import RankError, run_ranks
from tools.common.recipe_io import restore
from tools.replay.enter import ReplayPlan
from tools.replay.rank_trace import PartSeen, TensorPart, trace_step
from tools.replay.state_parts import stir_weights
from tools.replay.versions import release_environment
from tools.replay.whole_shapes import Dims, whole_shapes

LONGEST_SECONDS = 24 * 3600.0
_OF_THE_CLOCK = ("seconds", "tokens_per_second", "data_wait_share")
_VOTES = (False, False, False)  # as many as the loop's: they are summed with the losses, in one message of the same length


@dataclass(frozen=True)
class StepNumbers:
    """What a run logs of one step, computed again."""

    record: dict[str, Any]  # as in metrics.jsonl
    parameters: dict[str, np.ndarray]  # statistic -> float32 by parameter, in the model's order; empty where not due
    layers: dict[str, np.ndarray]  # statistic -> float32 by layer


@dataclass(frozen=True)
class RankResult:
    """What one rank computed."""

    names: tuple[str, ...]  # of the parameters
    steps: list[StepNumbers]  # equal on every rank
    state: dict[str, float] | None  # "kind of name" -> largest difference from the run's own checkpoint of the last step
    seen: list[PartSeen] = field(default_factory=list)  # of the traced step
    watched: list[TensorPart] = field(default_factory=list)


def compute(plan: ReplayPlan, folders: Sequence[Path] = ()) -> list[RankResult]:
    """Return every rank's result. folders: releases of packages to compute with (tools.replay.versions).

    Raises CheckError, with the first rank's reason, where the steps cannot be computed here.
    """
    try:
        if folders:
            return _compute_elsewhere(plan, folders)
        return run_ranks(replay_rank, plan.world_size, plan, timeout_seconds=LONGEST_SECONDS)
    except RankError as error:
        where = f"{plan.run}: the steps from {plan.come_from} to {plan.last_step} cannot be computed here"
        raise CheckError(f"{where}: {_reason(str(error))}") from error


def with_shapes(*plans: ReplayPlan) -> list[ReplayPlan]:
    """Give plans that are traced many times, on many ranks, the shapes that this needs: worked out once for equal models."""
    try:
        found = run_ranks(_shapes_of, 1, plans)[0]
    except RankError as error:
        raise CheckError(f"{plans[0].run}: the shapes of its tensors cannot be worked out: {_reason(str(error))}") from error
    return [replace(plan, shapes=shapes) for plan, shapes in zip(plans, found, strict=True)]


def _shapes_of(plans: Sequence[ReplayPlan]) -> list[dict[tuple[str, str], Dims]]:
    found: list[tuple[tuple, dict[tuple[str, str], Dims]]] = []
    for plan in plans:
        read = (plan.recipe.model.to_dict(), plan.recipe.attention, plan.recipe.mask_documents)
        found.append((read, next((shapes for other, shapes in found if other == read), None) or _shapes(plan)))
    return [shapes for _, shapes in found]


def _shapes(plan: ReplayPlan) -> dict[tuple[str, str], Dims]:
    return whole_shapes(plan.recipe.model, plan.recipe.attention, documents=plan.recipe.mask_documents)


def _reason(text: str) -> str:
    """Return which rank failed, where that is told, and the last line of its traceback."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    who = next((line for line in lines if line.startswith("tools.common.forked_ranks.RankError: ")), lines[0])
    who = who.removeprefix("tools.common.forked_ranks.RankError: ").removesuffix("failed:").strip()
    return lines[-1][:500] if who.startswith("Traceback") or len(lines) == 1 else f"{who}: {lines[-1][:500]}"


def _compute_elsewhere(plan: ReplayPlan, folders: Sequence[Path]) -> list[RankResult]:
    """Compute in a process that imports these releases. Between two versions of transformers the recipe goes as JSON."""
    with tempfile.TemporaryDirectory(prefix="trifold_replay_") as folder:
        sent, received = Path(folder, "plan"), Path(folder, "results")
        sent.write_bytes(pickle.dumps((replace(plan, recipe=None), recipe_to_dict(plan.recipe))))
        command = [sys.executable, "-m", "tools.replay.in_release", str(sent), str(received)]
        done = subprocess.run(
            command, env=release_environment(folders), cwd=ROOT, capture_output=True, text=True, errors="replace"
        )
        if done.returncode:
            raise RankError(done.stderr.strip() or f"the process that computes ended with {done.returncode}")
        return pickle.loads(received.read_bytes())  # our own child's bytes


def compute_sent(sent: Path, received: Path) -> None:
    """Do the other process's part of `compute`."""
    plan, recipe = pickle.loads(sent.read_bytes())  # our own parent's bytes
    plan = replace(plan, recipe=restore(recipe, Recipe))
    received.write_bytes(pickle.dumps(run_ranks(replay_rank, plan.world_size, plan, timeout_seconds=LONGEST_SECONDS)))


@dataclass(frozen=True)
class ReplayRank:
    """What a rank computes steps with."""

    trainer: Trainer
    stats: ParameterStats
    shapes: Mapping[tuple[str, str], Dims]  # of activations, for a trace


def replay_rank(plan: ReplayPlan) -> RankResult:
    """Compute the plan's steps, on every rank."""
    torch.set_num_threads(plan.threads)
    rank = build(plan)
    load(plan, rank.trainer)
    return take_steps(plan, rank)


def build(plan: ReplayPlan) -> ReplayRank:
    recipe, shapes = plan.recipe, plan.shapes
    if shapes is None:
        shapes = _shapes(plan) if plan.trace_step is not None else {}
    trainer = build_recipe_trainer(recipe, plan.layout, plan.ds_config, plan.device, draw=plan.checkpoint is None)
    return ReplayRank(trainer, ParameterStats(trainer, recipe.optimizer.clip), shapes)


def load(plan: ReplayPlan, trainer: Trainer) -> None:
    """Give the trainer the state before the plan's first step; without a checkpoint it has it."""
    if plan.checkpoint is not None:
        folder = Path(plan.checkpoint)
        found = damage(folder, stride=(trainer.grid.rank, plan.world_size))
        if found:
            raise CheckpointError("; ".join(found))
        load_state(Reader(folder), trainer)
    if plan.stir is not None:
        stir_weights(trainer, plan.stir)


def take_steps(plan: ReplayPlan, rank: ReplayRank) -> RankResult:
    """Take the plan's steps from the state that the trainer has. Collective."""
    recipe, position, trainer, stats = plan.recipe, plan.position, rank.trainer, rank.stats
    stream = open_train(recipe.data, recipe.batch.seq_len, position.order)
    steps: list[StepNumbers] = []
    seen, watched = [], []
    for step in range(plan.first_step, plan.last_step + 1):
        seqs = global_seqs_at(recipe.batch, position.consumed_seqs)
        tokens = seqs * recipe.batch.seq_len
        lr = learning_rate_at(recipe, step, position.consumed_tokens(recipe.batch.seq_len) + tokens)
        lr *= lr_factor_at(plan.history, step)
        other = plan.other_batch_at if step == plan.last_step else None
        micro_batches = step_micro_batches(
            stream,
            seed=recipe.seed,
            consumed=position.consumed_seqs if other is None else other,
            global_seqs=seqs,
            micro_seqs=recipe.batch.micro_seqs,
            data_rank=trainer.grid.reader,
            data_size=trainer.grid.readers,
            skips=position.skips,
        )
        trainer.set_global_seqs(seqs)
        seed_dropout(recipe.seed, step, trainer.grid)
        rules = recipe.monitor  # what is measured is summed with the losses: the message must be as long as the run's
        stats.begin(parameters=due(rules.every_steps, step), layers=due(rules.activations_every_steps, step))
        ceiling = 0.0 if step in plan.skipped_steps else math.inf
        traced = trace_step(trainer, plan, rank.shapes) if step == plan.trace_step else nullcontext()
        with traced as trace:
            result = trainer.train_step(micro_batches, lr, tokens, _VOTES, ceiling)
            if trace is not None:
                seen, watched = trace.finish(result)
        position = position.after_step(seqs, skipped=result.skipped)
        record = step_record(recipe, position, result, lr, tokens, 1.0, 0.0)
        steps.append(_numbers({k: v for k, v in record.items() if k not in _OF_THE_CLOCK}, result, stats))
    return RankResult(stats.names, steps, _state_difference(plan, trainer), seen, watched)


def _numbers(record: dict[str, Any], result: StepResult, stats: ParameterStats) -> StepNumbers:
    found = stats.read(result)
    names = ("loss_max", "loss_max_rank", "max_logit", "log_z")
    record |= {name: getattr(result, name) for name in names} | found.totals
    parameters = {name: np.asarray(values, dtype=np.float32) for name, values in found.values.items()}
    layers = {name: np.asarray(values, dtype=np.float32) for name, values in (found.activations or {}).items()}
    return StepNumbers(record, parameters, layers)


def _state_difference(plan: ReplayPlan, trainer: Trainer) -> dict[str, float] | None:
    """Compare this rank's part of the state with the run's checkpoint of the last step, where there is one."""
    folder = step_folder(Path(plan.run), plan.last_step)
    if not folder.is_dir() or plan.other_batch_at is not None:
        return None
    reader, found = Reader(folder), {}
    for partition in zero_state.partitions(trainer):
        for f in partition.fragments:
            held = trainer.stage.held.of(f.name)
            before = held.start(trainer.stage.whole_shapes[f.name])
            for kind, flat in partition.states.items():
                if f.name not in reader.tensors or kind not in reader.tensors[f.name]["kinds"]:
                    continue
                saved = torch.from_numpy(reader.shard(f.name, kind, held.shard, before + f.start, before + f.stop))
                ours = flat[f.offset : f.offset + f.stop - f.start].float().cpu()
                key = f"{kind} of {f.name}"
                found[key] = max(found.get(key, 0.0), float((ours - saved).abs().max().nan_to_num(math.inf)))
    return found
