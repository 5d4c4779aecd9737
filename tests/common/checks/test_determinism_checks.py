"""What breaks a level of determinism is named before the start: the layout, the model, the ds_config, a kernel."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from recipes.common.checks.determinism_checks import kernel_problems, level_problems, machine_problems
from recipes.common.checks.recipe_checks import check_recipe
from recipes.common.recipe import DETERMINISM, Layout, RecipeError
from tests.support.tiny import tiny_config, tiny_recipe
from tools.common.forked_ranks import run_ranks

RECIPE = tiny_recipe(Path("data"))


@pytest.mark.parametrize("level", DETERMINISM)
def test_every_level_is_taken(level: str) -> None:
    recipe = replace(RECIPE, determinism=level)
    assert level_problems(recipe, Layout(pipeline=2), 4, {}) == []
    assert check_recipe(recipe, 2, check_machine=False)[0] == RECIPE.layouts[2]


def test_another_word_is_none() -> None:
    with pytest.raises(RecipeError, match="determinism='exact' must be one of 'order', 'rounding', 'bitwise', 'bitwise_stages'"):
        check_recipe(replace(RECIPE, determinism="exact"), 2, check_machine=False)
    with pytest.raises(RecipeError, match="determinism=True must be a text"):
        check_recipe(replace(RECIPE, determinism=True), 2, check_machine=False)


@pytest.mark.parametrize(
    ("change", "layout", "world", "named"),
    [
        ({}, Layout(pipeline=2), 8, "4 data ranks"),
        ({}, Layout(context=2), 2, "context=2"),
        ({"model": tiny_config("llama", tie_word_embeddings=True)}, Layout(), 1, "model.tie_word_embeddings=True"),
        ({"model": tiny_config("llama", attention_dropout=0.1)}, Layout(), 1, "model.attention_dropout=0.1"),
    ],
)
def test_what_other_stages_would_sum_or_draw_in_another_order(change: dict, layout: Layout, world: int, named: str) -> None:
    (problem,) = level_problems(replace(RECIPE, determinism="bitwise_stages", **change), layout, world, {})
    assert problem.startswith("determinism='bitwise_stages': ") and named in problem
    assert level_problems(replace(RECIPE, determinism="bitwise", **change), layout, world, {}) == []


def test_quantized_messages_are_more_than_rounding() -> None:
    config = {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True, "zero_quantized_weights": False}}
    (problem,) = level_problems(replace(RECIPE, determinism="rounding"), Layout(), 1, config)
    assert "zero_optimization.zero_quantized_gradients=true" in problem
    assert level_problems(RECIPE, Layout(), 1, config) == []


def test_a_kernel_without_an_order_is_named() -> None:
    assert run_ranks(_kernels, 1)[0] == ([], True, [], [])


def _kernels() -> tuple[list[str], bool, list[str], list[str]]:
    """Return what is found of a sound family, whether a planted kernel is named, what "rounding" says of it, the mode left."""
    bitwise, cpu = replace(RECIPE, determinism="bitwise"), torch.device("cpu")
    sound = kernel_problems(bitwise, cpu, {})
    forward = LlamaMLP.forward

    def with_put(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        torch.zeros(4).put_(torch.tensor([1, 1]), torch.ones(2))  # which of two writes stays is open
        return forward(self, x)

    LlamaMLP.forward = with_put
    found = machine_problems(bitwise, 1, {})
    named = len(found) == 1 and "put_" in found[0] and "LlamaConfig" in found[0]
    return sound, named, machine_problems(replace(RECIPE, determinism="rounding"), 1, {}), _mode()


def _mode() -> list[str]:
    return ["on"] if torch.are_deterministic_algorithms_enabled() else []
