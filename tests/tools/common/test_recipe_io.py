"""Layouts as text, there and back."""

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
