"""How a layout shares experts between ranks is checked before a run, with the cure."""

import pytest
from transformers import AutoConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from recipes.common.checks.expert_checks import expert_option_problems, expert_problems, expert_size_problems
from recipes.common.checks.expert_trial import expert_trial_problems
from recipes.common.model.decoder import find_stack
from recipes.common.model.initial_weights import build_empty
from recipes.common.parallel.tiny_model import shrink
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


def test_sizes():
    assert expert_size_problems(Layout(expert=2), 6) == []
    assert expert_size_problems(Layout(expert=4), 6) == ["expert=4 does not divide 6 data ranks; use expert=1 or 2 or 3"]


SIX = {"num_local_experts": 6}
WHOLE = Layout(tensor=4, experts="tensor")


def test_models():
    [found] = run_ranks(_problems, 1)
    assert found == [
        [],
        ["layout expert=4, experts='tensor': model.layers.0.mlp.experts.gate_up_proj has 4 experts, not a multiple of expert=4 x "
         "tensor=4; use a size that fits, or expert=1"],
        ["layout experts='tensor': model.layers.0.mlp.experts.gate_up_proj has 6 experts, not a multiple of 4 ranks; use "
         "a size that fits, or experts='slices'"],
        ["layout experts='tensor': model_type=llama: it has no plan of experts (base_model_ep_plan); leave it out"],
        ["layout experts='tensor': model_type=qwen3_moe: this model has no experts; leave it out"],
    ]  # fmt: skip


def test_experts_that_are_not_what_their_plan_says_are_refused():
    sound, wrong = run_ranks(_tried, 1)[0]
    assert sound == [[], [], []]
    [[problem]] = wrong
    assert problem.startswith(
        "layout expert=2: half of the experts of model_type=mixtral do not give their part of what all give"
    )


def _tried():
    spread = Layout(expert=2)
    families = [tiny_config("mixtral"), *(shrink(AutoConfig.for_model(n), Layout()) for n in ("gpt_oss", "deepseek_v3"))]
    sound = [expert_trial_problems(config, spread, "eager") for config in families]
    own = MixtralExperts.forward
    MixtralExperts.forward = lambda self, tokens, index, weights: own(self, tokens, index, weights * weights)
    return sound, [expert_trial_problems(families[0], spread, "eager")]


def _problems():
    dense = tiny_config("qwen3_moe", num_experts=4, mlp_only_layers=[0, 1, 2, 3])
    both = Layout(tensor=4, expert=4, experts="tensor")
    causal = build_empty(tiny_config("mixtral"))
    found = [expert_problems(causal, find_stack(causal), layout) for layout in (WHOLE, both)]
    for config in (tiny_config("mixtral", **SIX), tiny_config("llama"), dense):
        causal = build_empty(config)
        found.append(expert_problems(causal, find_stack(causal), WHOLE))
    return found
