"""What the planner counts of products in fp8: their peak where they are, and the casts before them."""

from dataclasses import replace

import pytest

from recipes.common.config.ds_config import load_ds_config
from recipes.common.model.decoder import find_stack
from recipes.common.model.initial_weights import build_empty
from recipes.common.recipe import ROOT, Layout
from tests.support.tiny import tiny_config
from tools.common.devices import find_device
from tools.common.recipe_io import load_recipe
from tools.plan.fp8_cost import fp8_cost
from tools.plan.model_cases import Candidate, read_model, time_cases


def test_the_mean_layer_of_a_tensor_rank():
    causal = build_empty(tiny_config("llama"), "eager")
    cost = fp8_cost(causal, find_stack(causal), 2)
    assert cost.multiplied == 64 * (64 + 2 * 32 + 64) + 3 * 64 * 96
    # q 32 x 64, k and v 16 x 64, o 64 x 32, gate and up 48 x 64, down 64 x 48; 8 bytes an element
    assert cost.token_bytes == 8 * (96 + 2 * 80 + 96 + 3 * 112)
    assert cost.weight_bytes == 8 * cost.multiplied / 2


@pytest.mark.parametrize(("name", "all_of_it"), [("qwen3_0_6b", True), ("qwen3_30b_a3b", False)])
def test_layers_multiply_at_the_rate_of_fp8_as_far_as_they_do_so(name, all_of_it):
    recipe, device = load_recipe(str(ROOT / "recipes" / f"{name}.py")), find_device("H100")
    candidate = Candidate(layout=Layout(), data=8, micro_seqs=1)
    plain, fast = (
        time_cases(read_model(replace(recipe, precision=precision), load_ds_config(recipe.deepspeed)), [candidate], device)
        for precision in (None, "fp8")
    )
    bf16, fp8 = device.product_rate("bf16"), device.product_rate("fp8")
    assert plain.rate[0] == plain.rate_half[0] == fast.rate_half[0] == bf16
    if all_of_it:
        assert fast.rate[0] == pytest.approx(fp8)
    else:  # attention's matrices; the experts that a token visits stay in bf16
        assert bf16 < fast.rate[0] < fp8
    assert fast.traffic[0] > plain.traffic[0]
