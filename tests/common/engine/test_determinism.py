"""What the levels of determinism promise is so: equal bits in a rerun, and in other stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.common.recipe import Checkpoints, Evaluation, Layout, Monitor, Recipe
from recipes.common.run_dir.segments import read_segments
from tests.support.small_runs import assert_same_state, run
from tests.support.tiny import tiny_config, tiny_recipe, write_shards

STEPS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tokens"
    write_shards(folder, tokens=8_000)
    return folder


def recipe_of(data: Path, **fields: object) -> Recipe:
    common = {"steps": STEPS, "checkpoints": Checkpoints(every_steps=STEPS), "evaluation": Evaluation()}
    return tiny_recipe(data, **common | {"monitor": Monitor(activations_every_steps=0)} | fields)


def numbers(records: dict) -> list[tuple[float, float]]:
    return [(records[step]["loss"], records[step]["grad_norm"]) for step in sorted(records)]


def test_bitwise_with_dropout_on_two_ranks(data: Path, tmp_path: Path) -> None:
    """Also, by default nothing is switched: the record says which switches a run had."""
    model = tiny_config("llama", attention_dropout=0.1)
    recipe = recipe_of(data, layouts={2: Layout()}, model=model, determinism="bitwise")
    once, again = (run(recipe, 2, tmp_path / name) for name in ("once", "again"))
    assert numbers(once) == numbers(again)
    assert_same_state(tmp_path / "once", tmp_path / "again", 0.0)
    facts = read_segments(tmp_path / "once")[0].facts
    assert facts["torch.deterministic_algorithms"] is True and facts["determinism"] == "bitwise"


def test_bitwise_stages_in_other_pipelines(data: Path, tmp_path: Path) -> None:
    """One stage, two, two chunks a stage; and a resume from one into the other."""
    layouts = {
        "one": (1, Layout()),
        "two": (2, Layout(pipeline=2, recompute="full")),
        "folded": (2, Layout(pipeline=2, pipeline_schedule="zero_bubble_v")),
    }
    found = {}
    for name, (world, layout) in layouts.items():
        recipe = recipe_of(data, layouts={world: layout}, determinism="bitwise_stages", checkpoints=Checkpoints(every_steps=1))
        found[name] = numbers(run(recipe, world, tmp_path / name))
    assert found["two"] == found["one"] and found["folded"] == found["one"]
    for name in ("two", "folded"):
        assert_same_state(tmp_path / "one", tmp_path / name, 0.0)
    recipe = recipe_of(data, layouts={1: Layout()}, determinism="bitwise_stages")
    assert numbers(run(recipe, 1, tmp_path / "two", resume=True, resume_step=1)) == found["one"]
