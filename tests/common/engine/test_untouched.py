"""Parameters that no gradient reaches stay as they are drawn, as in plain torch; frozen ones are no parameters."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from recipes.common.model.initial_weights import build_empty
from recipes.common.monitor.parameter_stats import STATS, ParameterStats
from recipes.common.parallel.tiny_model import shrink
from recipes.common.recipe import SGD, AdamW, Layout
from tests.support.parity import ADAMW, assert_equal, trial_of
from tests.support.tiny import ds_config, tiny_config
from tools.common.forked_ranks import run_ranks
from tools.common.parity import build_trial_trainer, gradient_trial, initial_model, rank_batches

DECAYED = AdamW(lr=1e-2, eps=1e-5, weight_decay=0.5, clip=0.5)


@pytest.mark.parametrize(
    ("pipeline", "tensor", "data", "optimizer", "zero"),
    [(1, 1, 2, DECAYED, 1), (2, 1, 1, DECAYED, 1), (1, 1, 2, DECAYED, 3), (1, 1, 1, SGD(lr=0.1, weight_decay=0.5), 2)],
)
def test_an_indexer_is_left_alone(pipeline, tensor, data, optimizer, zero):
    config = shrink(AutoConfig.for_model("deepseek_v32"), Layout(pipeline=pipeline, tensor=tensor))
    options = {"optimizer": optimizer, "deepspeed": ds_config(f"zero{zero}_fp32.json"), "global_seqs": 2 * data, "steps": 2}
    assert_equal(trial_of(config, pipeline, tensor, data, **options), tensor=3e-5)


def _statistics(trial):
    trainer = build_trial_trainer(trial)
    stats = ParameterStats(trainer, trial.optimizer.clip)
    for micro in rank_batches(trial, trainer):
        stats.begin(parameters=True, layers=False)
        result = trainer.train_step(micro, trial.optimizer.lr, trial.global_seqs * trial.seq_len)
        read = stats.read(result)
    drawn = {name: p.detach() for name, p in initial_model(trial).named_parameters()}
    stays = [name for name, shard in trainer.hf_shards().items() if shard.equal(drawn[name])]
    return read, stats.names, stays, sorted(trainer.untouched)


def test_they_are_out_of_the_statistics():
    config = shrink(AutoConfig.for_model("deepseek_v32"), Layout(pipeline=2))
    read, names, stays, _ = run_ranks(_statistics, 1, trial_of(config, 1, 1, 1, optimizer=DECAYED, global_seqs=2, steps=2))[0]
    indexers = [name for name in names if ".indexer." in name]
    assert len(indexers) >= 10 and sorted(stays) == sorted(indexers)
    for statistic in STATS:
        missing = [name for name, value in zip(names, read.values[statistic], strict=True) if np.isnan(value)]
        assert sorted(missing) == sorted(indexers), statistic
    cut = run_ranks(_statistics, 2, trial_of(config, 2, 1, 1, optimizer=DECAYED, global_seqs=2, steps=2))
    for rank_read, _, _, untouched in cut:
        assert rank_read.totals == pytest.approx(read.totals, rel=1e-5)
        assert untouched and set(untouched) < set(indexers)  # each stage knows its own


def test_a_model_whose_parameters_all_train_has_none():
    *_, untouched = run_ranks(_statistics, 1, trial_of(tiny_config("llama"), 1, 1, 1, optimizer=ADAMW, global_seqs=2, steps=1))[0]
    assert untouched == []


@pytest.mark.parametrize("family", ["afmoe", "ernie4_5_moe", "laguna"])
def test_frozen_biases_are_buffers(family):
    config = shrink(AutoConfig.for_model(family), Layout(pipeline=2))
    causal = build_empty(config)
    biases = [name for name, _ in causal.named_buffers() if name.endswith(("e_score_correction_bias", "expert_bias"))]
    assert len(biases) >= 2 and all(p.requires_grad for p in causal.parameters())
    assert set(biases) < set(causal.state_dict())
    assert all(torch.equal(causal.get_buffer(name), torch.zeros_like(causal.get_buffer(name))) for name in biases)
    assert_equal(gradient_trial(trial_of(config, 2, 1, 1, global_seqs=2)))
