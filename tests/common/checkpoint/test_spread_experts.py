"""A run whose experts move between ranks at each resume trains, saves and records what a run on one rank does."""

import json

import numpy as np
import pytest

from recipes.common.recipe import AdamW, Batch, Evaluation, Layout, Monitor
from recipes.common.run_dir.tensor_stats import read_stats
from tests.support.small_runs import assert_same_state, small_recipe, train_run
from tests.support.tiny import tiny_config, write_shards

STARTS = [  # layout, ranks: one step each
    (Layout(expert=4), 4),
    (Layout(tensor=2, expert=2, experts="tensor"), 4),
    (Layout(expert=4), 4),
    (Layout(), 1),
]


def test_each_start_goes_on_with_other_ranks(tmp_path):
    write_shards(tmp_path / "data")
    recipe = small_recipe(
        tmp_path / "data",
        tiny_config("mixtral", num_hidden_layers=2),
        optimizer=AdamW(lr=1e-3, eps=1e-5, clip=0.5),
        batch=Batch(seq_len=16, micro_seqs=1, global_seqs=4),
        evaluation=Evaluation(),
        monitor=Monitor(drift_every_steps=1, activations_every_steps=1),
        steps=len(STARTS),
    )
    train_run(recipe, tmp_path / "straight", Layout(), 1, steps=len(STARTS))
    for step, (layout, ranks) in enumerate(STARTS, 1):
        train_run(recipe, tmp_path / "parts", layout, ranks, resume=step > 1, steps=step)
    assert_same_state(tmp_path / "straight", tmp_path / "parts", 1e-5)
    lines = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("straight", "parts")]
    straight, parts = ([record for record in map(json.loads, each) if record["step"]] for each in lines)
    assert [record["step"] for record in parts] == [1, 2, 3, 4]
    for left, right in zip(straight, parts, strict=True):
        for field in ("loss", "grad_norm", "update_norm", "router_loss", "load_evenness", "router_load_max/max"):
            assert right[field] == pytest.approx(left[field], rel=2e-5), (left["step"], field)
    stats = [read_stats(tmp_path / run, 1, len(STARTS)) for run in ("straight", "parts")]
    for name, wanted in stats[0].values.items():
        if name != "tiny_v_share":  # counts of what rounding decides
            np.testing.assert_allclose(stats[1].values[name], wanted, rtol=1e-4, atol=1e-6, err_msg=name)
