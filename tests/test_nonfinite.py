"""A NaN changes no weight on any rank, and is named: where it was first, in which micro batch of which data rank."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd.graph import get_gradient_edge

from recipes.common.check import check_recipe
from recipes.common.ds_config import merge_ds_config
from recipes.common.engine import NONFINITE, OVERFLOW
from recipes.common.metrics import read_metrics
from recipes.common.monitor import Probe
from recipes.common.nonfinite import ACTIVATION, GRADIENT, LOSS, UNREPEATED, WEIGHT, find_nonfinite
from recipes.common.recipe import AdamW, Checkpoints, Evaluation, Layout, Monitor, derive_sizes
from recipes.common.tensor_stats import read_stats
from recipes.common.train import train
from tests.test_fp16 import allow_fp16, fp16_config
from tests.tiny import ds_config, tiny_config, tiny_recipe, write_shards
from tools.common.local_ranks import RankError, run_ranks
from tools.common.numerics import Trial, build_trainer, rank_batches

BAD_STEP, BAD_MICRO_BATCH = 1, 1
ADAMW = AdamW(lr=1e-3, eps=1e-5, clip=0.5)


def trial_of(pipeline=1, tensor=1, data=1, config="zero1_fp32.json", **fields):
    layout = Layout(pipeline=pipeline, tensor=tensor, recompute_every=fields.pop("recompute_every", 0))
    deepspeed = ds_config(config) if isinstance(config, str) else config
    trial = Trial(
        model=tiny_config("llama"), layout=layout, world_size=pipeline * tensor * data, optimizer=ADAMW, deepspeed=deepspeed
    )
    return replace(trial, steps=3, **fields)


class Plant:
    """Something goes wrong in one micro batch of the bad step, and again when that step is repeated."""

    def __init__(self, trainer, trial):
        self.calls, self.per_step = 0, trial.global_seqs // (trial.micro_seqs * trial.data)
        self.on, self.repeats = True, True
        trainer.stage.register_forward_pre_hook(self.count)

    def count(self, module, args):
        self.calls += 1

    def now(self):
        step, micro_batch = divmod(self.calls - 1, self.per_step)  # a repeated step counts as the one after
        return self.on and micro_batch == BAD_MICRO_BATCH and step in ((BAD_STEP, BAD_STEP + 1) if self.repeats else (BAD_STEP,))

    def in_output(self, module, value):
        module.register_forward_hook(
            lambda m, args, out: out.masked_fill(torch.ones_like(out).cumsum(-1) == 3, value) if self.now() else None
        )

    def in_gradient(self, parameter):
        self.keep = get_gradient_edge(parameter).node
        self.keep.register_prehook(lambda grads: (grads[0].clone().fill_(torch.inf),) if self.now() else None)


def run_planted(trial, where, data_rank, tensor_rank=0):
    """Three steps, the second of which goes wrong: (result, what was found, weights) of each."""
    if trial.deepspeed.get("fp16", {}).get("enabled"):
        allow_fp16()
    trainer = build_trainer(trial)
    probe = Probe(trainer, trial.optimizer.clip)
    plant = Plant(trainer, trial)
    grid, causal = trainer.grid, trainer.stage.causal
    here = grid.data_rank == data_rank and grid.tensor_rank == tensor_rank
    plant.repeats = where != "once"
    layer = 2 if 2 in trainer.stage.own else None
    if here and layer is not None and where in ("output", "once"):
        plant.in_output(causal.model.layers[layer].mlp.up_proj, torch.nan)
    if here and layer is not None and where == "gradient":
        plant.in_gradient(causal.model.layers[layer].mlp.up_proj.weight)
    if grid.data_rank == data_rank and grid.is_last_stage and where == "loss":  # a target of probability 0
        causal.lm_head.register_forward_hook(
            lambda m, args, out: torch.cat([out[..., :-40], out[..., -40:] - torch.inf], -1) if plant.now() else None
        )
    steps = []
    for index, micro in enumerate(rank_batches(trial, trainer)):
        if where == "weight" and index == BAD_STEP and here and layer is not None:
            parameter = causal.model.layers[layer].mlp.up_proj.weight
            getattr(parameter, "ds_tensor", parameter).data.flatten()[3] = torch.inf
        scored = trial.global_seqs * trial.seq_len
        probe.begin(parameters=True, layers=False)
        result = trainer.train_step(micro, trial.optimizer.lr, scored)
        seen = probe.read(result)
        assert bool(seen.values) != result.skipped
        found = find_nonfinite(trainer, micro, scored) if result.skip_reason == NONFINITE else None
        weights = (
            {name: w.clone() for name, w in trainer.hf_shards().items()}
            if trial.deepspeed["zero_optimization"]["stage"] < 3
            else {}
        )
        steps.append((result.skip_reason, found, result.loss, weights))
    return steps


CONFIGS = ["zero1_fp32.json", "zero1_bf16.json", "zero2_fp32.json", "zero2_bf16.json", "zero3_fp32.json", "zero3_bf16.json"]


@pytest.mark.parametrize(
    ("pipeline", "tensor", "data", "config"), [(1, 1, 2, c) for c in CONFIGS] + [(2, 2, 2, c) for c in CONFIGS[:2]]
)
def test_the_first_activation_is_named_and_the_step_is_as_if_it_had_not_been(pipeline, tensor, data, config):
    trial = trial_of(pipeline, tensor, data, config, recompute_every=1)
    ranks = run_ranks(run_planted, trial.world_size, trial, "output", 1)
    clean = run_ranks(run_planted, trial.world_size, trial, "nowhere", 0)
    for rank, steps in enumerate(ranks):
        assert [reason for reason, *_ in steps] == [None, NONFINITE, None]
        found = steps[1][1]
        assert found == ranks[0][1][1]
        assert (found.kind, found.name, found.value) == (ACTIVATION, "output of model.layers.2.mlp.up_proj", "NaN")
        assert (found.layer, found.stage, found.data_rank, found.tensor_rank) == (2, pipeline - 1, 1, 0)
        assert (found.micro_batch, found.hit) == (BAD_MICRO_BATCH, ((1, BAD_MICRO_BATCH),))
        assert found.sequences == (BAD_MICRO_BATCH * data + 1, BAD_MICRO_BATCH * data + 2)
        assert dict(found.gradients)["model.layers.0.mlp.up_proj.weight"] > 0
        assert np.isnan(steps[1][2])
        for name, weight in steps[1][3].items():
            assert weight.equal(steps[0][3][name]), name
        assert steps[0][2] == clean[rank][0][2]
    # the step after is the second of a run that never saw the bad one: nothing of it stayed, Adam's count included
    without = run_ranks(skip_second, trial.world_size, trial)
    assert [steps[2][2] for steps in ranks] == [losses[1] for losses, _ in without]
    for steps, (_, weights) in zip(ranks, without, strict=True):
        assert all(weight.equal(weights[name]) for name, weight in steps[2][3].items())


def skip_second(trial):
    trainer = build_trainer(trial)
    losses = []
    for index, micro in enumerate(rank_batches(trial, trainer)):
        if index != BAD_STEP:
            losses.append(trainer.train_step(micro, trial.optimizer.lr, trial.global_seqs * trial.seq_len).loss)
    return losses, {name: w.clone() for name, w in trainer.hf_shards().items()}


@pytest.mark.parametrize(
    ("where", "kind", "name", "value"),
    [
        ("weight", WEIGHT, "model.layers.2.mlp.up_proj.weight", "Infinity"),
        ("gradient", GRADIENT, "model.layers.2.mlp.up_proj.weight", "Infinity"),
        ("loss", ACTIVATION, "output of lm_head", "Infinity"),
        ("once", UNREPEATED, "", ""),
    ],
)
@pytest.mark.parametrize(("pipeline", "tensor"), [(1, 1), (2, 1)])
def test_what_was_first(pipeline, tensor, where, kind, name, value):
    trial = trial_of(pipeline, tensor, 2)
    for steps in run_ranks(run_planted, trial.world_size, trial, where, 1):
        reason, found, *_ = steps[1]
        assert reason == NONFINITE
        assert (found.kind, found.name, found.value) == (kind, name, value)
        if kind in (WEIGHT, GRADIENT):
            assert (found.layer, found.stage, found.data_rank) == (2, pipeline - 1, 1)
        if kind == GRADIENT:
            assert (found.micro_batch, found.hit) == (BAD_MICRO_BATCH, ((1, BAD_MICRO_BATCH),))
            assert dict(found.gradients) == {name: 64 * 96}
