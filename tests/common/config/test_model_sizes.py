"""A config whose model has no end is told before anything is built of it."""

from __future__ import annotations

import pytest

from recipes.common.checks.model_checks import model_problems
from recipes.common.recipe import Layout
from tests.support.tiny import tiny_config, tiny_recipe


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"num_hidden_layers": 10**8}, "model.num_hidden_layers=100000000 must be a whole number from 1 to 4_096; write"),
        ({"hidden_size": -64}, "model.hidden_size=-64 must be a whole number from 1 to 1_048_576; write"),
        ({"hidden_act": "evil"}, "model.hidden_act='evil': LlamaConfig does not know 'evil'; write"),
    ],
)
def test_a_recipe_with_sizes_that_no_model_has(tmp_path, fields, problem):
    recipe = tiny_recipe(tmp_path, model=tiny_config("llama", **fields))
    [said] = model_problems(recipe, Layout())
    assert said.startswith(problem)
