"""A NaN changes no weight on any rank, and is named: where it was first, in which micro batch of which data rank."""

import itertools
from dataclasses import replace

import deepspeed
import numpy as np
import pytest
import torch
from torch.autograd.graph import get_gradient_edge

from recipes.common.engine.trainer import NONFINITE
from recipes.common.model.main_grads import main_grad_of
from recipes.common.monitor.nonfinite import ACTIVATION, GRADIENT, LOSS, UNREPEATED, WEIGHT, find_nonfinite
from recipes.common.monitor.parameter_stats import ParameterStats
from recipes.common.recipe import AdamW, Layout
from tests.support.fp16 import allow_fp16, fp16_config
from tests.support.tiny import VOCAB, ds_config, tiny_config
from tools.common.forked_ranks import run_ranks
from tools.common.parity import Trial, build_trial_trainer, rank_batches

BAD_STEP, BAD_MICRO_BATCH = 1, 1
ADAMW = AdamW(lr=1e-3, eps=1e-5, clip=0.5)


def trial_of(pipeline, tensor, data, config="zero1_fp32.json", **fields):
    cut = {name: fields.pop(name) for name in ("recompute", "pipeline_schedule") if name in fields}
    layout = Layout(pipeline=pipeline, tensor=tensor, **cut)
    trial = Trial(
        model=tiny_config("llama", num_hidden_layers=3),
        layout=layout,
        world_size=pipeline * tensor * data,
        optimizer=ADAMW,
        deepspeed=ds_config(config),
    )
    return replace(trial, steps=3, global_seqs=2 * data, **fields)


class Plant:
    """Something goes wrong in one micro batch of the bad step, and again when that step is repeated (`once`: not again)."""

    def __init__(self, trainer, trial, *, once):
        self.calls, self.per_step = 0, trial.global_seqs // (trial.micro_seqs * trial.data)
        self.bad_steps = (BAD_STEP,) if once else (BAD_STEP, BAD_STEP + 1)  # a repeated step counts as the one after
        trainer.stage.register_forward_pre_hook(self.count)

    def count(self, module, args):
        self.calls += 1

    def now(self):
        return self.bad(self.calls - 1)

    def bad(self, call):
        step, micro_batch = divmod(call, self.per_step)
        return micro_batch == BAD_MICRO_BATCH and step in self.bad_steps

    def in_output(self, module):
        third = torch.arange(module.out_features) == 3
        module.register_forward_hook(lambda m, args, out: out.masked_fill(third, torch.nan) if self.now() else None)

    def in_gradient(self, parameter):
        """In training a product adds it to the weight's sum; when the step is repeated it is autograd's."""
        calls, main_grad = itertools.count(), main_grad_of(parameter)
        self.node, add_product = get_gradient_edge(parameter).node, main_grad.add_product

        def hook(gradients):
            if gradients[0] is not None and self.bad(next(calls)):
                return (torch.full_like(gradients[0], torch.inf),)

        def add(left, right, product):
            add_product(torch.full_like(left, torch.inf) if self.bad(next(calls)) else left, right, product)

        self.node.register_prehook(hook)
        main_grad.add_product = add

    def in_loss(self, stage):
        """Targets of probability 0, behind every module: the loss is infinite, its gradients are finite."""
        logits_of, some = stage.logits, torch.arange(VOCAB) % 3 == 0
        stage.logits = lambda hidden: logits_of(hidden).masked_fill(some & self.now(), -torch.inf)


def run_planted(trial, where, data_rank):
    """(skip reason, what was found, loss, weights, loss scale) of three steps; the second goes wrong on one data rank."""
    if "fp16" in trial.deepspeed:
        allow_fp16()
    trainer = build_trial_trainer(trial)
    stats = ParameterStats(trainer, trial.optimizer.clip)
    plant = Plant(trainer, trial, once=where == "once")
    grid, stage = trainer.grid, trainer.stage
    victim = stage.causal.model.layers[2].mlp.up_proj if 2 in stage.own_layers else None
    if grid.data_rank == data_rank and grid.tensor_rank == 0 and victim is not None:
        if where in ("output", "once"):
            plant.in_output(victim)
        if where == "gradient":
            plant.in_gradient(victim.weight)
        if where == "loss" and stage.is_last:
            plant.in_loss(stage)
    steps, scored = [], trial.global_seqs * trial.seq_len
    for index, micro in enumerate(rank_batches(trial, trainer)):
        if where == "weight" and index == BAD_STEP and grid.data_rank == data_rank and victim is not None:
            victim.weight.data.flatten()[3] = torch.inf
        stats.begin(parameters=True, layers=False)
        result = trainer.train_step(micro, trial.optimizer.lr, scored)
        assert bool(stats.read(result).values) != result.skipped
        found = find_nonfinite(trainer, micro, scored) if result.skip_reason == NONFINITE else None
        steps.append((result.skip_reason, found, result.loss, whole_weights(trainer), result.loss_scale))
    return steps


def whole_weights(trainer):
    with deepspeed.zero.GatheredParameters(
        list(trainer.stage.parameters()), enabled=trainer.engine.zero_optimization_stage() == 3
    ):
        return {name: weight.clone() for name, weight in trainer.hf_shards().items()}


LAYOUTS = [
    (2, 1, 2, "zero1_bf16.json"),
    (1, 2, 2, "zero2_fp32.json"),
    (1, 1, 2, "zero3_bf16.json"),
]


@pytest.mark.parametrize(("pipeline", "tensor", "data", "config"), LAYOUTS)
def test_the_first_activation_is_named_and_the_step_is_as_if_it_had_not_been(pipeline, tensor, data, config):
    trial = trial_of(pipeline, tensor, data, config, recompute="full")
    ranks, without = zip(*run_ranks(_with_and_without, trial.world_size, trial), strict=True)
    for steps in ranks:
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
    # the step after is the second of a run that never saw the bad one: nothing of it stayed, Adam's count included
    assert [steps[2][2] for steps in ranks] == [losses[1] for losses, _ in without]
    for steps, (_, weights) in zip(ranks, without, strict=True):
        assert all(weight.equal(weights[name]) for name, weight in steps[2][3].items())


def _with_and_without(trial):
    return run_planted(trial, "output", 1), skip_second(trial)


def skip_second(trial):
    trainer = build_trial_trainer(trial)
    losses = []
    for index, micro in enumerate(rank_batches(trial, trainer)):
        if index != BAD_STEP:
            losses.append(trainer.train_step(micro, trial.optimizer.lr, trial.global_seqs * trial.seq_len).loss)
    return losses, whole_weights(trainer)


UP = "model.layers.2.mlp.up_proj.weight"
FIRST = [
    (2, "weight", WEIGHT, UP, "Infinity"),
    (1, "gradient", GRADIENT, UP, "Infinity"),
    (2, "gradient", GRADIENT, UP, "Infinity"),
    (1, "loss", LOSS, "cross-entropy", "Infinity"),
    (2, "loss", LOSS, "cross-entropy", "Infinity"),
    (1, "once", UNREPEATED, "", ""),
]
PUT_OFF = (2, "a gradient that the schedule puts off")


def _run_each(planted):
    return [run_planted(trial, where, 1) for trial, where in planted]


@pytest.fixture(scope="module")
def planted():
    """(stages, where) -> all ranks' steps up to the bad one, of two data ranks of which the second goes wrong."""
    cases = {(pipeline, where): (replace(trial_of(pipeline, 1, 2), steps=BAD_STEP + 1), where) for pipeline, where, *_ in FIRST}
    cases[PUT_OFF] = replace(trial_of(2, 1, 2, pipeline_schedule="zero_bubble"), steps=BAD_STEP + 1), "gradient"
    found = {}
    for pipeline in (1, 2):
        some = [case for case in cases if case[0] == pipeline]
        ranks = run_ranks(_run_each, 2 * pipeline, [cases[case] for case in some])
        found |= {case: [rank[index] for rank in ranks] for index, case in enumerate(some)}
    return found


@pytest.mark.parametrize(("pipeline", "where", "kind", "name", "value"), FIRST)
def test_what_was_first(planted, pipeline, where, kind, name, value):
    for steps in planted[pipeline, where]:
        reason, found, *_ = steps[BAD_STEP]
        assert reason == NONFINITE
        assert (found.kind, found.name, found.value) == (kind, name, value)
        if kind in (WEIGHT, GRADIENT, LOSS):
            assert (found.stage, found.data_rank) == (pipeline - 1, 1)
        if kind in (GRADIENT, LOSS):
            assert (found.micro_batch, found.hit) == (BAD_MICRO_BATCH, ((1, BAD_MICRO_BATCH),))
        if kind == GRADIENT:
            assert dict(found.gradients) == {name: 64 * 96}


def test_weight_gradients_that_a_schedule_puts_off_are_seen_too(planted):
    for steps in planted[PUT_OFF]:
        found = steps[1][1]
        assert (found.kind, found.name) == (GRADIENT, UP)
        assert (found.micro_batch, found.hit) == (BAD_MICRO_BATCH, ((1, BAD_MICRO_BATCH),))


def test_a_nan_under_fp16_is_no_second_overflow():
    """The loss scale falls once, though the step is run twice."""
    trial = replace(trial_of(1, 1, 2), deepspeed=fp16_config(initial_scale_power=12, hysteresis=1))
    for steps in run_ranks(run_planted, 2, trial, "output", 1):
        assert [reason for reason, *_ in steps] == [None, NONFINITE, None]
        assert [scale for *_, scale in steps] == [2.0**12, 2.0**11, 2.0**11]
        assert steps[1][1].name == "output of model.layers.2.mlp.up_proj"
