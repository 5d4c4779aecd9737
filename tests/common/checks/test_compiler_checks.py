"""Compiled kernels: what a recipe may ask, what a machine must have, and what the dry run says."""

import shutil
from dataclasses import replace

import pytest

from recipes.common.checks import compiler_checks
from recipes.common.checks.compiler_checks import compiler_problems, fusion_lines, fusion_problems
from recipes.common.model.decoder import find_stack
from recipes.common.model.initial_weights import build_empty
from recipes.common.recipe import ROOT
from tools.common.recipe_io import load_recipe


@pytest.fixture(scope="module")
def recipe():
    return replace(load_recipe(str(ROOT / "recipes" / "gpt2_124m.py")), kernels="compile")


def test_what_a_recipe_may_ask(recipe):
    assert fusion_problems(recipe) == []
    assert fusion_problems(replace(recipe, kernels="fast")) == ["kernels='fast' must be one of 'none', 'compile'"]
    (problem,) = fusion_problems(replace(recipe, determinism="bitwise"))
    assert problem.startswith("kernels='compile' with determinism='bitwise': ") and "use kernels='none'" in problem


def test_a_machine_without_a_compiler(recipe, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda command: None)
    (problem,) = compiler_problems(recipe)
    assert problem.startswith("kernels='compile': a C++ compiler is needed, and none of g++, clang++ is found")
    assert compiler_problems(replace(recipe, kernels="none")) == []


def test_the_dry_run_says_what_is_fused(recipe):
    causal = build_empty(recipe.model, recipe.attention)
    layers = causal.get_submodule(find_stack(causal).layers)
    (line,) = fusion_lines(recipe, layers)
    assert line.endswith(": norms in 12 of 12 layers, rotation in 0 of 12 layers, activations in 12 of 12 layers; the loss")
    assert not any("forward" in vars(module) for module in layers.modules())
    assert fusion_lines(replace(recipe, kernels="none"), layers) == []


def test_layers_of_one_kind_are_fused_once(recipe, monkeypatch):
    """An attribute that a forward may ask makes another kind; the number of a layer does not."""
    layers = build_empty(recipe.model, recipe.attention).transformer.h
    layers[3].mlp.is_gated, seen = True, []
    monkeypatch.setattr(compiler_checks, "fuse_layer", lambda layer: seen.append(layer) or frozenset())
    fusion_lines(recipe, layers)
    assert [layer.attn.layer_idx for layer in seen] == [0, 3]
