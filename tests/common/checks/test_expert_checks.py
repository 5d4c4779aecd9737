"""How a layout shares experts between ranks is checked before a run, with the cure."""

import pytest

from recipes.common.checks.expert_checks import expert_option_problems, expert_problems
from recipes.common.model.decoder import find_stack
from recipes.common.model.initial_weights import build_empty
from recipes.common.recipe import Layout
from tests.support.tiny import tiny_config
from tools.common.forked_ranks import run_ranks


@pytest.mark.parametrize(
    ("layout", "problems"),
    [
        (Layout(tensor=2, experts="tensor"), []),
        (Layout(tensor=2, experts="whole"), ["experts='whole' must be one of 'slices', 'tensor'"]),
        (Layout(experts="tensor"), ["experts='tensor' with tensor=1: no tensor ranks could share experts; leave it out"]),
    ],
)
def test_options(layout, problems):
    assert expert_option_problems(layout) == problems


SIX = {"num_local_experts": 6}
WHOLE = Layout(tensor=4, experts="tensor")


def test_models():
    [found] = run_ranks(_problems, 1)
    assert found == [
        [],
        ["layout experts='tensor': model.layers.0.mlp.experts.gate_up_proj has 6 experts, not a multiple of tensor=4; use "
         "tensor=2 or 3, or experts='slices'"],
        ["layout experts='tensor': model_type=llama: it has no plan of experts (base_model_ep_plan); leave it out"],
        ["layout experts='tensor': model_type=qwen3_moe: this model has no experts; leave it out"],
    ]  # fmt: skip


def _problems():
    dense = tiny_config("qwen3_moe", num_experts=4, mlp_only_layers=[0, 1, 2, 3])
    found = []
    for config in (tiny_config("mixtral"), tiny_config("mixtral", **SIX), tiny_config("llama"), dense):
        causal = build_empty(config)
        found.append(expert_problems(causal, find_stack(causal), WHOLE))
    return found
