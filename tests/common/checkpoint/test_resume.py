"""Resumed equals uninterrupted: bitwise in the same layout, within rounding in any other; damage is found and passed over."""

import itertools
import json
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recipes.common.checkpoint.files import damage, out_dir_problems
from recipes.common.checkpoint.reader import Reader
from recipes.common.parallel.dropout import seed_dropout
from recipes.common.recipe import Checkpoints, Evaluation, Layout
from recipes.common.run_dir.checkpoint_folders import sealed_checkpoints
from tests.support.small_runs import assert_same_state, run
from tests.support.tiny import tiny_config, tiny_recipe, write_shards
from tools.common.forked_ranks import RankError

STEPS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "tokens"
    write_shards(folder)
    return folder


@pytest.fixture(scope="module")
def with_dropout(data, tmp_path_factory):
    """An uninterrupted run of four ranks, and a folder for changed copies of it."""
    folder = tmp_path_factory.mktemp("dropout")
    recipe = tiny_recipe(
        data,
        model=tiny_config("llama", attention_dropout=0.1),
        deepspeed="zero1_bf16.json",
        steps=STEPS,
        evaluation=Evaluation(),
        checkpoints=Checkpoints(every_steps=2),
    )
    return recipe, folder, run(recipe, 4, folder / "straight")


def flip_a_bit(path, byte, bit=2):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(bytes(content))


def test_same_layout_is_bitwise_with_dropout_on_from_the_newest_intact_checkpoint(with_dropout):
    recipe, folder, straight = with_dropout
    shutil.copytree(folder / "straight", folder / "parts", symlinks=True)
    flip_a_bit(sealed_checkpoints(folder / "parts")[-1] / "rank_00002.safetensors", -100)
    resumed = run(recipe, 4, folder / "parts", resume=True)
    manifest = json.loads((folder / "parts" / "run.json").read_text())
    assert manifest["starts"][-1]["resumed_step"] == 2
    for step in range(1, STEPS + 1):
        assert resumed[step]["loss"] == straight[step]["loss"], step
        assert resumed[step]["grad_norm"] == straight[step]["grad_norm"], step
    assert_same_state(folder / "straight", folder / "parts", 0.0)
    state = Reader(folder / "parts" / "checkpoints" / "latest").state
    assert state["optimizer_steps"] == STEPS


def test_every_flipped_byte_is_found_and_no_file_is_a_pickle(with_dropout):
    _, run_dir, _ = with_dropout
    folder = shutil.copytree(sealed_checkpoints(run_dir / "straight")[-1], run_dir / "flipped")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert damage(folder) == []
    rng = np.random.default_rng(0)
    for path in files:
        for place in rng.integers(0, path.stat().st_size, 3):
            bit = int(rng.integers(0, 8))
            flip_a_bit(path, place, bit)
            assert damage(folder), f"bit flip at byte {place} of {path.name} went unseen"
            flip_a_bit(path, place, bit)
    assert damage(folder) == []


def test_going_on_from_an_older_checkpoint_sets_the_later_ones_aside(data, tmp_path):
    """A crash before the next save must not bring back what was left behind."""
    recipe = tiny_recipe(data, steps=3, evaluation=Evaluation(), checkpoints=Checkpoints(every_steps=1, keep_last=9))
    straight = run(recipe, 2, tmp_path)
    run(recipe, 2, tmp_path, resume=True, resume_step=1, max_steps=2)
    kept = [folder.name for folder in sealed_checkpoints(tmp_path)]
    assert kept == ["step_00000001", "step_00000002"]
    assert sorted(path.name for path in (tmp_path / "checkpoints/abandoned").iterdir()) == ["step_00000002", "step_00000003"]
    assert (tmp_path / "checkpoints/latest").resolve().name == "step_00000002"
    again = run(recipe, 2, tmp_path, resume=True)
    assert [again[step]["loss"] for step in again] == [straight[step]["loss"] for step in straight]


def test_a_step_without_a_checkpoint_is_refused_with_those_that_have_one(tmp_path):
    for step in (5, 10):
        (tmp_path / f"checkpoints/step_{step:08d}").mkdir(parents=True)
    assert out_dir_problems(tmp_path, True, 10) == []
    assert out_dir_problems(tmp_path, True, 7) == [
        f"--resume-step=7: --out-dir={tmp_path} holds checkpoints of steps [5, 10]; give one of these"
    ]


def test_dropout_is_on_and_differs_between_steps_data_ranks_and_stages(data, tmp_path, monkeypatch):
    """The bitwise test above would pass without it, or with its zeros at the same places every step."""
    with_dropout = tiny_recipe(data, model=tiny_config("llama", attention_dropout=0.5), steps=1)
    without = tiny_recipe(data, steps=1)
    assert run(with_dropout, 1, tmp_path / "a")[1]["loss"] != run(without, 1, tmp_path / "b")[1]["loss"]
    seeds = []
    monkeypatch.setattr(torch, "default_generator", SimpleNamespace(manual_seed=seeds.append))
    for run_seed, step, data_rank, stage in itertools.product((0, 1), repeat=4):
        seed_dropout(run_seed, step, SimpleNamespace(data_rank=data_rank, pipeline_rank=stage))
    assert len(set(seeds)) == 16


# (pipeline, tensor, data), ds_config
LAYOUTS = {
    "1,1,1": (Layout(), 1, "zero1_fp32.json"),
    "2,1,1": (Layout(pipeline=2), 2, "zero1_fp32.json"),
    "2,1,1 folded": (Layout(pipeline=2, pipeline_schedule="zero_bubble_v"), 2, "zero1_fp32.json"),
    "2,1,1 around": (Layout(pipeline=2, pipeline_schedule="zero_bubble", chunks=2), 2, "zero1_fp32.json"),
    "1,2,1": (Layout(tensor=2), 2, "zero1_fp32.json"),
    "1,1,2": (Layout(), 2, "zero1_fp32.json"),
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


TIED = ("2,1,1 folded", "2,2,2", "1,1,1", "1,2,2 zero3")  # where the copies of a tied embedding stand differently
UNTIED = tuple(name for name in LAYOUTS if name not in TIED)


@pytest.mark.parametrize(("tied", "names"), [(False, UNTIED), (True, TIED)])
def test_every_layout_goes_on_in_another(data, tmp_path, tied, names):
    """A step in each layout, from the checkpoint of the one before, and a last one in the first again."""
    recipe = tiny_recipe(
        data,
        model=tiny_config("llama", tie_word_embeddings=tied),
        num_params=140_224 - (131 * 64 if tied else 0),
        evaluation=Evaluation(),
        steps=len(names) + 1,
    )
    straight = run(*in_layout(recipe, "1,1,1"), tmp_path / "straight")
    for step, name in enumerate((*names, names[0]), 1):
        resumed = run(*in_layout(recipe, name), tmp_path / "run", resume=step > 1, max_steps=step)
        assert resumed[step]["loss"] == pytest.approx(straight[step]["loss"], rel=1e-6), (step, name)
        assert resumed[step]["grad_norm"] == pytest.approx(straight[step]["grad_norm"], rel=1e-5), (step, name)
    assert_same_state(tmp_path / "straight", tmp_path / "run", 1e-5)


def test_bf16_goes_on_in_fp32_and_back(data, tmp_path):
    recipe = tiny_recipe(data, evaluation=Evaluation(), steps=4)
    bf16 = replace(recipe, deepspeed="zero1_bf16.json")
    run(bf16, 4, tmp_path / "run", max_steps=1)
    run(recipe, 2, tmp_path / "run", resume=True, max_steps=2)
    losses = run(bf16, 1, tmp_path / "run", resume=True)
    straight = run(recipe, 1, tmp_path / "straight")
    for step in straight:
        assert losses[step]["loss"] == pytest.approx(straight[step]["loss"], rel=2e-3), step


def test_resume_with_nothing_intact_says_so(data, tmp_path):
    with pytest.raises(RankError, match=r"holds 0 checkpoints, none intact"):
        run(tiny_recipe(data), 1, tmp_path, resume=True)


def test_what_is_kept(data, tmp_path):
    checkpoints = Checkpoints(every_steps=1, keep_last=2, keep_every_steps=2)
    run(tiny_recipe(data, evaluation=Evaluation(), checkpoints=checkpoints, steps=6), 1, tmp_path)
    assert [int(folder.name[5:]) for folder in sealed_checkpoints(tmp_path)] == [2, 4, 5, 6]
    assert os.readlink(tmp_path / "checkpoints" / "latest") == "step_00000006"


def test_saves_by_the_clock_of_one_rank(data, tmp_path):
    checkpoints = Checkpoints(every_minutes=1e-6, keep_last=9)  # every step: no two ranks' clocks agree on it
    run(tiny_recipe(data, evaluation=Evaluation(), checkpoints=checkpoints, steps=3), 2, tmp_path)
    assert [int(folder.name[5:]) for folder in sealed_checkpoints(tmp_path)] == [1, 2, 3]
