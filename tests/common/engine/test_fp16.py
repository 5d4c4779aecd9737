"""fp16 with dynamic loss scaling: it tracks fp32, and an overflow is skipped, counted, shown, and changes no weight.

DeepSpeed refuses fp16 on most CPUs; torch computes it on all. The ranks therefore tell DeepSpeed that it is supported. On a GPU:
tests/gpu.
"""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from recipes.common.checks.recipe_checks import check_recipe
from recipes.common.config.ds_config import merge_ds_config
from recipes.common.recipe import AdamW, Batch, Checkpoints, Evaluation, Layout, derive_sizes
from recipes.common.run_dir.metrics import read_metrics
from recipes.common.run_dir.progress import describe_step
from recipes.common.train import SKIPS_IN_A_ROW, start_run, train
from tests.support.fp16 import allow_fp16, fp16_config
from tests.support.parity import both_of_each
from tests.support.tiny import tiny_config, tiny_recipe, write_shards
from tools.common.forked_ranks import RankError, run_ranks
from tools.common.parity import Trial, initial_model, outcome, train_in_layout

POWER, STEPS = 22, 17  # the exponent of a loss scale that is some 5 halvings too large
ADAMW = AdamW(lr=1e-3, eps=1e-5, clip=0.5)


def trial_of(pipeline, tensor, config, **fields):
    layout = Layout(pipeline=pipeline, tensor=tensor)
    model = tiny_config("llama", num_hidden_layers=2, tie_word_embeddings=True)
    trial = Trial(model=model, layout=layout, world_size=pipeline * tensor, optimizer=ADAMW, deepspeed=config)
    return replace(trial, **fields)


LAYOUTS = [(2, 2), (1, 1)]  # pipeline, tensor


def test_fp16_tracks_fp32():
    """Three steps of lr 1e-3: the loss within 5e-4 and the norm within 1e-2, relative; weights as in the bf16 test."""
    trials = {layout: trial_of(*layout, fp16_config(initial_scale_power=12)) for layout in LAYOUTS}
    for layout, (trained, plain) in both_of_each(trials, allow_fp16).items():
        steps = trials[layout].steps
        assert trained.skipped == [False] * steps
        assert trained.losses == pytest.approx(plain.losses, rel=5e-4)
        assert trained.losses != plain.losses  # it was fp16
        assert trained.grad_norms == pytest.approx(plain.grad_norms, rel=1e-2)
        worst = max((trained.parameters[name] - p).abs().max().item() for name, p in plain.parameters.items())
        assert worst <= 2 * steps * ADAMW.lr


@pytest.mark.parametrize(("pipeline", "tensor"), LAYOUTS)
def test_a_step_that_overflows_changes_no_weight(pipeline, tensor):
    trial = trial_of(pipeline, tensor, fp16_config(initial_scale_power=60), steps=1)
    ranks = run_ranks(_in_half_and_trained, trial.world_size, trial)
    plain = ranks[0][0]
    shapes = {name: tensor.shape for name, tensor in plain.items()}
    trained = outcome([part for _, part in ranks], shapes)
    assert trained.skipped == [True]
    assert all(trained.parameters[name].equal(plain[name]) for name in plain)


def _in_half_and_trained(trial):
    initial = {name: p.detach().half().float() for name, p in initial_model(trial).named_parameters()}
    allow_fp16()
    return initial, train_in_layout(trial)


def recipe_of(folder, pipeline, tensor, config):
    write_shards(folder / "data")
    (folder / "fp16.json").write_text(json.dumps(config))
    layouts = {pipeline * tensor: Layout(pipeline=pipeline, tensor=tensor)}
    fields = {"deepspeed": str(folder / "fp16.json"), "steps": STEPS, "evaluation": Evaluation(), "checkpoints": Checkpoints()}
    return tiny_recipe(folder / "data", layouts=layouts, **fields)


def test_overflows_are_skipped_counted_and_shown(tmp_path, capfd):
    """Each overflow halves the scale until gradients fit; from then on it is a run like any other, a resume included."""
    pipeline, tensor = 2, 1
    out_dir, config = tmp_path / "run", fp16_config(initial_scale_power=POWER, hysteresis=1)
    recipe = recipe_of(tmp_path, pipeline, tensor, config)
    for resume, max_steps in ((False, STEPS - 4), (True, STEPS)):
        run_ranks(_train, pipeline * tensor, recipe, pipeline * tensor, str(out_dir), resume, max_steps)
    records = list(read_metrics(out_dir))
    skipped = [record["skipped_steps"] for record in records]
    overflows = skipped[-1]
    assert 3 < overflows < STEPS - 8
    assert skipped[:4] == [1, 2, 3, 4]
    assert {after - before for before, after in pairwise(skipped)} == {0, 1}
    # an overflow's own line shows the scale that it leaves; with no overflow it stays, over the resume too
    assert [record["loss_scale"] for record in records] == [2.0 ** (POWER - count) for count in skipped]
    assert f"skipped {overflows}" in describe_step(records[-1])
    assert f"step {STEPS}/{STEPS} | {describe_step(records[-1])}" in capfd.readouterr().err
    state = json.loads((out_dir / "checkpoints" / "latest" / "state.json").read_text())
    assert (state["step"], state["skipped_steps"], state["optimizer_steps"]) == (STEPS, overflows, STEPS - overflows)


def test_a_run_that_only_overflows_stops_and_says_so(tmp_path):
    recipe = replace(
        recipe_of(tmp_path, 1, 1, fp16_config(initial_scale_power=60, hysteresis=1)),
        model=tiny_config("llama", num_hidden_layers=1),
        num_params=47_680,
        batch=Batch(seq_len=16, micro_seqs=1, global_seqs=1),
        steps=SKIPS_IN_A_ROW + 1,
    )
    with pytest.raises(RankError, match=rf"step {SKIPS_IN_A_ROW}: {SKIPS_IN_A_ROW} steps in a row overflowed, loss scale"):
        run_ranks(_train, 1, recipe, 1, str(tmp_path / "run"), False, None)


def _train(recipe, world_size, out_dir, resume, max_steps):
    allow_fp16()
    layout, config = check_recipe(recipe, world_size, check_machine=True)
    sizes = derive_sizes(recipe, layout, world_size)
    config = merge_ds_config(config, recipe, sizes, sizes.accumulation)
    train(start_run(recipe, layout, sizes, config, Path(out_dir), resume_run=resume, max_steps=max_steps))
