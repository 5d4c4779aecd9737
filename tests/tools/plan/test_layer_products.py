"""The products of a layer are its matrices: as many multiply-adds as the FLOP count has, divided over the ranks."""

import pytest

from recipes.common.model.decoder import find_stack
from recipes.common.model.flops import layer_work
from recipes.common.model.initial_weights import build_empty
from recipes.common.recipe import ROOT, WHOLE, Layout
from tools.common.recipe_io import load_recipe
from tools.plan.layer_products import layer_products


@pytest.mark.parametrize(
    "name, layout, ranks",
    [
        ("llama_8b", Layout(), 1),
        ("llama_8b", Layout(tensor=4), 4),
        ("gpt2_124m", Layout(tensor=2), 2),
        ("qwen3_30b_a3b", Layout(expert=8), 1),  # own experts, of the tokens of all expert ranks
        ("mixtral_8x7b", Layout(tensor=2, expert=2), 2),
        ("mixtral_8x7b", Layout(tensor=2, experts=WHOLE), 2),
    ],
)
def test_products_are_the_layers_matrices(name, layout, ranks):
    recipe = load_recipe(str(ROOT / "recipes" / f"{name}.py"))
    causal = build_empty(recipe.model, recipe.attention)
    stack = find_stack(causal)
    work = layer_work(causal, stack)
    found = sum(p.width * p.inner * p.rows * p.groups * count for p, count in layer_products(causal, stack, layout).items())
    routers = sum(w.numel() for n, w in causal.named_parameters() if n.endswith("mlp.gate.weight")) / len(work)
    wanted = sum(layer.matrices for layer in work) / len(work)
    assert found == pytest.approx((wanted - routers) / ranks + routers)  # every rank has the whole router


def test_experts_are_one_launch_and_see_their_share_of_the_tokens():
    recipe = load_recipe(str(ROOT / "recipes" / "mixtral_8x7b.py"))
    causal = build_empty(recipe.model, recipe.attention)
    banks = [p for p in layer_products(causal, find_stack(causal), Layout(expert=4)) if p.groups > 1]
    assert {(p.groups, p.rows) for p in banks} == {(2.0, 1.0)}  # 2 of 8 experts, each a quarter of the tokens of 4 ranks
