"""Products in fp8: what a recipe may ask, what its layout and its GPUs must allow, and what the dry run says."""

from dataclasses import replace

import pytest

from recipes.common.checks.precision_checks import (
    capability_problems,
    fp8_problems,
    precision_lines,
    precision_problems,
    shard_problems,
)
from recipes.common.config.ds_config import load_ds_config
from recipes.common.model.decoder import find_stack
from recipes.common.model.initial_weights import build_empty
from recipes.common.parallel.tensor_parallel import plan_tensor_parallel
from recipes.common.recipe import ROOT, Layout
from tests.support.tiny import tiny_config
from tools.common.recipe_io import load_recipe


@pytest.fixture(scope="module")
def recipe():
    return replace(load_recipe(str(ROOT / "recipes" / "qwen3_0_6b.py")), precision="fp8")


def test_what_a_recipe_may_ask(recipe):
    assert precision_problems(recipe, load_ds_config(recipe.deepspeed)) == []
    assert precision_problems(replace(recipe, precision=None), load_ds_config("zero1_fp32.json")) == []
    (problem,) = precision_problems(replace(recipe, precision="fp4"), None)
    assert problem == f"precision='fp4' must be one of 'fp8', or None, for that of {recipe.deepspeed}"
    (problem,) = precision_problems(replace(recipe, deepspeed="zero1_fp16.json"), load_ds_config("zero1_fp16.json"))
    assert problem.startswith("precision='fp8' with ds_configs/zero1_fp16.json, which is fp16: ") and "zero1_bf16.json" in problem


def test_widths_of_shards():
    causal = build_empty(tiny_config("llama"), "eager")
    stack = find_stack(causal)
    assert shard_problems(causal, stack, plan_tensor_parallel(causal, stack, 2)) == []
    (problem,) = shard_problems(causal, stack, plan_tensor_parallel(causal, stack, 4))
    assert problem == (
        "precision='fp8' with tensor=4: each tensor rank has of model.layers.0.self_attn.k_proj.weight 8 x 64 and 19 more, and "
        "products in fp8 need multiples of 16; use a smaller tensor size, or precision=None"
    )


def test_a_family_without_such_linears(recipe):
    (problem,) = fp8_problems(replace(recipe, model=tiny_config("gpt2")), Layout())
    assert problem.startswith("precision='fp8': no layer of GPT2LMHeadModel has a linear")


def test_gpus_that_cannot():
    assert capability_problems("H100", (9, 0)) == capability_problems("L40S", (8, 9)) == []
    (problem,) = capability_problems("A100", (8, 0))
    assert problem.startswith("precision='fp8': A100 has compute capability 8.0, and products in fp8 need 8.9 ")


def test_the_dry_run_says_what_is_multiplied_so(recipe):
    causal = build_empty(recipe.model, recipe.attention)
    (line,) = precision_lines(recipe, causal)
    assert line == (
        "fp8 in q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj: 100.0 % of the layers' matrices; all else in "
        "bf16; without a GPU emulated, and slower than bf16"
    )
    assert precision_lines(replace(recipe, precision=None), causal) == []
