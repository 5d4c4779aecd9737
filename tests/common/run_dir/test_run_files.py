"""The run files say what was trained, are whole or absent, and keep what a resume replaces."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig

from recipes.common.recipe import WSD, AdamW, Batch, Layout, Recipe, derive_sizes
from recipes.common.run_dir.run_files import read_run, recipe_to_dict, write_run_files


def make_recipe() -> Recipe:
    return Recipe(
        name="tiny",
        model=LlamaConfig(hidden_size=64, num_hidden_layers=2, dtype="bfloat16"),
        num_params=1,
        tokenizer="t",
        data="d",
        layouts={8: Layout(tensor=2, pipeline=2)},
        batch=Batch(seq_len=16, micro_seqs=1, global_seqs=8, ramp=((16, 4),)),
        optimizer=AdamW(lr=1e-3),
        schedule=WSD(warmup_steps=2, cooldown_steps=2),
        steps=10,
        deepspeed="zero1_bf16.json",
    )


def start(folder: Path, recipe: Recipe, resumed_step: int | None = None) -> dict:
    layout = Layout(tensor=2, pipeline=2)
    sizes = derive_sizes(recipe, layout, 8)
    return write_run_files(
        folder,
        recipe_to_dict(recipe),
        {"zero_optimization": {"stage": 1}},
        layout=layout,
        sizes=sizes,
        resumed_step=resumed_step,
    )


def test_the_run_files(tmp_path: Path) -> None:
    run = start(tmp_path / "new" / "run", make_recipe())
    folder = tmp_path / "new" / "run"
    assert sorted(path.name for path in folder.iterdir()) == ["deepspeed.json", "recipe.json", "run.json"]
    assert json.loads((folder / "run.json").read_text()) == run
    (first,) = run["starts"]
    assert (first["world_size"], first["layout"]["pipeline"]) == (8, 2)
    assert first["resumed_step"] is None
    assert first["command"][0] == sys.executable
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe["schedule"]["class"] == "WSD"
    assert recipe["optimizer"] == {
        "class": "AdamW",
        "lr": 1e-3,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.1,
        "decay_embeddings": True,
        "clip": 1.0,
    }
    assert recipe["layouts"]["8"]["tensor"] == 2
    assert recipe["batch"]["ramp"] == [[16, 4]]


def test_the_model_can_be_read_back() -> None:
    from transformers import CONFIG_MAPPING

    recipe = make_recipe()
    saved = json.loads(json.dumps(recipe_to_dict(recipe)))["model"]
    assert saved.pop("class") == "LlamaConfig"
    assert CONFIG_MAPPING[saved["model_type"]].from_dict(saved).to_dict() == recipe.model.to_dict()


def test_a_resume_adds_itself_and_keeps_what_it_replaces(tmp_path: Path) -> None:
    recipe = make_recipe()
    first = start(tmp_path, recipe)
    start(tmp_path, recipe, resumed_step=4)
    again = start(tmp_path, replace(recipe, steps=20), resumed_step=6)
    assert again["run_id"] == first["run_id"]
    assert [item["resumed_step"] for item in again["starts"]] == [None, 4, 6]
    assert json.loads((tmp_path / "recipe.json").read_text())["steps"] == 20
    assert json.loads((tmp_path / "recipe.before_step_00000007.json").read_text())["steps"] == 10
    start(tmp_path, recipe, resumed_step=6)
    assert json.loads((tmp_path / "recipe.before_step_00000007.2.json").read_text())["steps"] == 20
    # another run in the same directory is another run
    other = start(tmp_path, recipe)
    assert other["run_id"] != first["run_id"]
    assert json.loads((tmp_path / "run.before_step_00000001.json").read_text())["run_id"] == first["run_id"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 50,
        b"{",
        b"[]",
        b"\xff",
        b"{}",
        b'{"run_id": "x", "starts": [1]}',
        b'{"run_id": 3, "starts": []}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_file_is_set_aside_and_named_and_the_start_goes_on(tmp_path: Path, content: bytes, capfd) -> None:
    first = start(tmp_path, make_recipe())
    (tmp_path / "run.json").write_bytes(content)
    (tmp_path / "recipe.json").write_bytes(content)
    again = start(tmp_path, make_recipe(), resumed_step=4)
    assert again["run_id"] != first["run_id"] and len(again["starts"]) == 1
    assert json.loads((tmp_path / "recipe.json").read_text())["name"] == "tiny"
    for name in ("run", "recipe"):
        assert (tmp_path / f"{name}.before_step_00000005.json").read_bytes() == content
    told = capfd.readouterr().err
    assert f"{tmp_path}/run.json is damaged: it is run.before_step_00000005.json now, and begins anew" in told
    assert read_run(tmp_path) == again
