"""Resumed equals uninterrupted: bitwise in the same layout, within rounding in any other; damage is found and passed over."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from recipes.common.checkpoint.files import damage, out_dir_problems
from recipes.common.checkpoint.reader import Reader
from recipes.common.recipe import Checkpoints, Evaluation, Layout
from recipes.common.run_dir.checkpoint_folders import sealed_checkpoints
from tests.support.small_runs import assert_same_state, run
from tests.support.tiny import tiny_config, tiny_recipe, write_shards
from tools.common.forked_ranks import RankError

HALF, WHOLE = 2, 4  # steps


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "tokens"
    write_shards(folder)
    return folder


def test_same_layout_is_bitwise_with_dropout_on(data, tmp_path):
    recipe = tiny_recipe(data, model=tiny_config("llama", attention_dropout=0.1), deepspeed="zero1_bf16.json", steps=WHOLE)
    straight = run(recipe, 4, tmp_path / "straight")
    run(recipe, 4, tmp_path / "parts", max_steps=HALF)
    resumed = run(recipe, 4, tmp_path / "parts", resume=True)
    for step in range(1, WHOLE + 1):
        assert resumed[step]["loss"] == straight[step]["loss"], step
        assert resumed[step]["grad_norm"] == straight[step]["grad_norm"], step
    assert_same_state(tmp_path / "straight", tmp_path / "parts", 0.0)
    state = Reader(tmp_path / "parts" / "checkpoints" / "latest").state
    assert state["optimizer_steps"] == WHOLE


def test_going_on_from_an_older_checkpoint_sets_the_later_ones_aside(data, tmp_path):
    """A crash before the next save must not bring back what was left behind."""
    recipe = tiny_recipe(data, steps=WHOLE, evaluation=Evaluation(), checkpoints=Checkpoints(every_steps=1, keep_last=9))
    straight = run(recipe, 2, tmp_path)
    run(recipe, 2, tmp_path, resume=True, resume_step=2, max_steps=3)
    kept = [folder.name for folder in sealed_checkpoints(tmp_path)]
    assert kept == ["step_00000001", "step_00000002", "step_00000003"]
    assert sorted(path.name for path in (tmp_path / "checkpoints/abandoned").iterdir()) == ["step_00000003", "step_00000004"]
    assert (tmp_path / "checkpoints/latest").resolve().name == "step_00000003"
    again = run(recipe, 2, tmp_path, resume=True)
    assert [again[step]["loss"] for step in again] == [straight[step]["loss"] for step in straight]


def test_a_step_without_a_checkpoint_is_refused_with_those_that_have_one(tmp_path):
    for step in (5, 10):
        (tmp_path / f"checkpoints/step_{step:08d}").mkdir(parents=True)
    assert out_dir_problems(tmp_path, True, 10) == []
    assert out_dir_problems(tmp_path, True, 7) == [
        f"--resume-step=7: --out-dir={tmp_path} holds checkpoints of steps [5, 10]; give one of these"
    ]


def test_dropout_differs_between_steps_and_data_ranks(data, tmp_path):
    """The bitwise test above would pass with dropout's zeros at the same places every step."""
    with_dropout = tiny_recipe(data, model=tiny_config("llama", attention_dropout=0.5), steps=2)
    without = tiny_recipe(data, steps=2)
    assert run(with_dropout, 1, tmp_path / "a")[1]["loss"] != run(without, 1, tmp_path / "b")[1]["loss"]


# (pipeline, tensor, data), ds_config
LAYOUTS = {
    "1,1,1": (Layout(), 1, "zero1_fp32.json"),
    "2,1,1": (Layout(pipeline=2), 2, "zero1_fp32.json"),
    "2,1,1 folded": (Layout(pipeline=2, pipeline_schedule="zero_bubble_v"), 2, "zero1_fp32.json"),
    "2,1,1 around": (Layout(pipeline=2, pipeline_schedule="zero_bubble", chunks=2), 2, "zero1_fp32.json"),
    "1,2,1": (Layout(tensor=2), 2, "zero1_fp32.json"),
    "1,1,2": (Layout(), 2, "zero1_fp32.json"),
    "2,2,1": (Layout(pipeline=2, tensor=2), 4, "zero1_fp32.json"),
    "2,2,2": (Layout(pipeline=2, tensor=2), 8, "zero1_fp32.json"),
    "3,1,1": (Layout(pipeline=3), 3, "zero1_fp32.json"),
    "1,4,1": (Layout(tensor=4), 4, "zero1_fp32.json"),
    "1,1,2 zero2": (Layout(), 2, "zero2_fp32.json"),
    "1,2,1 zero2": (Layout(tensor=2), 2, "zero2_fp32.json"),
    "1,1,2 zero3": (Layout(), 2, "zero3_fp32.json"),
    "1,2,2 zero3": (Layout(tensor=2), 4, "zero3_fp32.json"),
}


def in_layout(recipe, name):
    layout, world_size, config = LAYOUTS[name]
    return replace(recipe, layouts={world_size: layout}, deepspeed=config), world_size


TIED = ("2,2,2", "1,1,1", "2,1,1 folded", "1,2,2 zero3")  # where the copies of a tied embedding stand differently


@pytest.fixture(scope="module")
def first_halves(data, tmp_path_factory):
    """For every layout, a run stopped in the middle; and one that was not. By whether embeddings are tied."""
    halves = {}
    for tied, names in ((False, LAYOUTS), (True, TIED)):
        folder = tmp_path_factory.mktemp("halves")
        recipe = tiny_recipe(
            data,
            model=tiny_config("llama", tie_word_embeddings=tied),
            num_params=140_224 - (131 * 64 if tied else 0),
            evaluation=Evaluation(),
            steps=WHOLE,
        )
        for name in names:
            run(*in_layout(recipe, name), folder / name, max_steps=HALF)
        halves[tied] = recipe, folder, run(*in_layout(recipe, "1,1,1"), folder / "straight")
    return halves


@pytest.mark.parametrize(("tied", "saved_in"), [(False, name) for name in LAYOUTS] + [(True, name) for name in TIED])
def test_every_layout_goes_on_in_another(first_halves, tmp_path, tied, saved_in):
    """Each layout is saved from, and the next one goes on from it."""
    recipe, folder, straight = first_halves[tied]
    names = TIED if tied else tuple(LAYOUTS)
    loaded_in = names[(names.index(saved_in) + 1) % len(names)]
    shutil.copytree(folder / saved_in, tmp_path / "run", symlinks=True)
    resumed = run(*in_layout(recipe, loaded_in), tmp_path / "run", resume=True)
    for step in range(HALF + 1, WHOLE + 1):
        assert resumed[step]["loss"] == pytest.approx(straight[step]["loss"], rel=1e-6), (saved_in, loaded_in, step)
    assert_same_state(folder / "straight", tmp_path / "run", 1e-5)


def test_bf16_goes_on_in_fp32_and_back(data, tmp_path):
    recipe = tiny_recipe(data, evaluation=Evaluation(), steps=2 * WHOLE)
    bf16 = replace(recipe, deepspeed="zero1_bf16.json")
    run(bf16, 4, tmp_path / "run", max_steps=HALF)
    run(recipe, 2, tmp_path / "run", resume=True, max_steps=WHOLE)
    losses = run(bf16, 8, tmp_path / "run", resume=True)
    straight = run(recipe, 1, tmp_path / "straight")
    assert losses[2 * WHOLE]["loss"] == pytest.approx(straight[2 * WHOLE]["loss"], rel=2e-3)


def test_every_flipped_byte_is_found(data, tmp_path):
    run(tiny_recipe(data, evaluation=Evaluation(), steps=2), 4, tmp_path)
    folder = sealed_checkpoints(tmp_path)[-1]
    assert damage(folder) == []
    rng = np.random.default_rng(0)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        whole = path.read_bytes()
        for place in rng.integers(0, len(whole), 3):
            changed = bytearray(whole)
            changed[place] ^= 1 << int(rng.integers(0, 8))
            path.write_bytes(bytes(changed))
            assert damage(folder), f"bit flip at byte {place} of {path.name} went unseen"
            path.write_bytes(whole)
    assert damage(folder) == []


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(data, tmp_path):
    recipe = tiny_recipe(data, evaluation=Evaluation(), checkpoints=Checkpoints(every_steps=2))
    straight = run(recipe, 4, tmp_path, max_steps=6)
    newest = sealed_checkpoints(tmp_path)[-1] / "rank_00002.safetensors"
    content = bytearray(newest.read_bytes())
    content[-100] ^= 4
    newest.write_bytes(bytes(content))
    resumed = run(recipe, 4, tmp_path, resume=True)
    manifest = json.loads((tmp_path / "run.json").read_text())
    assert manifest["starts"][-1]["resumed_step"] == 4
    assert [resumed[step]["loss"] for step in (5, 6)] == [straight[step]["loss"] for step in (5, 6)]


def test_resume_with_nothing_intact_says_so(data, tmp_path):
    with pytest.raises(RankError, match=r"holds 0 checkpoints, none intact"):
        run(tiny_recipe(data), 1, tmp_path, resume=True)


def test_what_is_kept(data, tmp_path):
    checkpoints = Checkpoints(every_steps=1, keep_last=2, keep_every_steps=3)
    run(tiny_recipe(data, evaluation=Evaluation(), checkpoints=checkpoints), 2, tmp_path)
    assert [int(folder.name[5:]) for folder in sealed_checkpoints(tmp_path)] == [3, 6, 7, 8]
    assert os.readlink(tmp_path / "checkpoints" / "latest") == "step_00000008"


def test_saves_by_the_clock_of_one_rank(data, tmp_path):
    checkpoints = Checkpoints(every_minutes=1e-6, keep_last=9)  # every step: no two ranks' clocks agree on it
    run(tiny_recipe(data, evaluation=Evaluation(), checkpoints=checkpoints, steps=3), 4, tmp_path)
    assert [int(folder.name[5:]) for folder in sealed_checkpoints(tmp_path)] == [1, 2, 3]


def test_no_pickle_is_in_a_checkpoint(data, tmp_path):
    run(tiny_recipe(data, evaluation=Evaluation(), steps=2), 1, tmp_path)
    suffixes = {path.suffix for path in sealed_checkpoints(tmp_path)[0].rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors"}
