"""Layouts as text, there and back."""

import json
import os

import pytest

from recipes.common.recipe import ROOT, RecipeError
from tests.support.shelf import read_shelf
from tests.support.small_runs import call
from tools.common.recipe_io import layout_text, load_recipe, parse_layout


@pytest.mark.parametrize("name", read_shelf())
def test_a_layout_written_as_text_is_read_as_the_same(name):
    for layout in load_recipe(str(ROOT / "recipes" / f"{name}.py")).layouts.values():
        data = 2 * layout.context
        assert parse_layout(layout_text(layout, data)) == (layout, data)


def test_what_is_at_its_default_is_left_out():
    layout, data = parse_layout("pipeline=2,layers_per_stage=5+3,offload_activations=1,recompute=full")
    assert layout_text(layout, data) == "pipeline=2,recompute=full,offload_activations=1,layers_per_stage=5+3,data=1"


def test_a_recipe_edited_within_a_second_is_read_as_it_is_now(tmp_path):
    """Of the same size and time: Python's cache of compiled files would take it for the one before."""
    file, text = tmp_path / "edited.py", (ROOT / "recipes" / "gpt2_124m.py").read_text()
    names = []
    for name in ("first", "other"):
        file.write_text(text.replace('name="gpt2_124m"', f'name="{name}"'))
        os.utime(file, (1e9, 1e9))
        names.append(load_recipe(str(file)).name)
    assert names == ["first", "other"]


@pytest.mark.parametrize("last", ["sys.exit(0)", "main(recipe)"])
def test_a_recipe_that_ends_the_program_is_an_error(tmp_path, capsys, monkeypatch, last):
    file = tmp_path / "no_guard.py"
    source = (ROOT / "recipes" / "quickstart.py").read_text()
    file.write_text(source.replace('if __name__ == "__main__":\n    main(recipe)', last))
    monkeypatch.setattr("sys.argv", ["plan", "explain", str(file)])
    with pytest.raises(RecipeError) as error:
        load_recipe(str(file))
    why = 'it ends the program when it is read; call main(recipe) only under `if __name__ == "__main__":`'
    assert error.value.problems == [f"{file}: {why}"] and capsys.readouterr().out == ""


def test_what_a_recipe_prints_is_not_on_the_tools_stdout(tmp_path):
    file = tmp_path / "talks.py"
    source = (ROOT / "recipes" / "quickstart.py").read_text()
    file.write_text(source.replace("recipe = Recipe(", 'print("hello")\nrecipe = Recipe(').replace("2_361_024", "5"))
    told = call("plan", "explain", "tensor=1", file, "--gpu-type", "H100", "--json")
    assert told.code == 0 and json.loads(told.out)["recipe"] == "quickstart"
    note = "note: num_params=5 but the model has 2_361_024 parameters; check the model's fields for a wrong value, or correct "
    assert told.err.splitlines() == ["hello", f"{note}num_params"]
