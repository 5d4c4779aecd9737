"""A config whose model has no end is told before anything is built of it."""

from __future__ import annotations

import pytest

from recipes.common.checks.model_checks import model_problems
from recipes.common.recipe import Layout
from tests.support.tiny import tiny_config, tiny_recipe


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"num_hidden_layers": 10**8}, "model.num_hidden_layers=100000000: must be from 0 to 10000"),
        ({"hidden_size": -64}, "model=LlamaConfig: Trying to create tensor with negative dimension"),
        ({"hidden_act": "evil"}, "model=LlamaConfig: 'evil'"),
    ],
)
def test_a_recipe_with_sizes_that_no_model_has(tmp_path, fields, problem):
    recipe = tiny_recipe(tmp_path, model=tiny_config("llama", **fields))
    [said] = model_problems(recipe, Layout())
    assert said.startswith(problem)
