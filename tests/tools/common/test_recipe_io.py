"""Layouts as text, there and back."""

import os

import pytest

from recipes.common.recipe import ROOT
from tests.support.shelf import read_shelf
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
