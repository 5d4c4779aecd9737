"""What a tensor rank multiplies tokens by: its shards, and the whole of what no plan shards."""

import re

from recipes.common.model.decoder import find_stack
from recipes.common.model.initial_weights import build_empty
from recipes.common.recipe import Layout
from tests.support.stages import config_of
from tools.plan.rank_params import rank_matrices

WHOLE = re.compile(r"self_attn\.(q_a_proj|kv_a_proj_with_mqa)\.weight|mlp\.gate\.weight")  # latent projections, and routers


def test_matrices_that_no_plan_shards_count_on_every_rank():
    causal = build_empty(config_of("deepseek_v3"), "sdpa")
    stack = find_stack(causal)
    alone, of_two = (rank_matrices(causal, stack, Layout(tensor=tensor)) for tensor in (1, 2))
    whole = [
        sum(parameter.numel() for name, parameter in layer.named_parameters() if WHOLE.fullmatch(name))
        for layer in causal.get_submodule(stack.layers)
    ]
    assert min(whole) > 0
    assert of_two == [(every - kept) / 2 + kept for every, kept in zip(alone, whole, strict=True)]
