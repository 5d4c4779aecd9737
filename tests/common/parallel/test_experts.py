"""Experts on ranks of their own train what one process of plain transformers trains."""

import pytest
from transformers import AutoConfig

from recipes.common.parallel.tiny_model import shrink
from recipes.common.recipe import Layout
from tests.support.parity import assert_equal, trial_of
from tests.support.tiny import tiny_config
from tools.common.parity import gradient_trial


@pytest.mark.parametrize(
    ("family", "pipeline", "tensor", "fields"),
    [
        ("mixtral", 2, 2, {"pipeline_schedule": "zero_bubble"}),
        ("deepseek_v3", 1, 2, {"recompute": "selective"}),  # shared experts, a dense first layer
        ("gpt_oss", 1, 2, {"recompute": "full"}),  # biases of experts
    ],
)
def test_tensor_ranks_have_whole_experts(family, pipeline, tensor, fields):
    if family == "mixtral":
        config = tiny_config(family)
    else:
        config = shrink(AutoConfig.for_model(family, attention_dropout=0.0), Layout(tensor=tensor, experts="tensor"))
    trial = trial_of(config, pipeline, tensor, 1, experts="tensor", global_seqs=2, **fields)
    assert_equal(gradient_trial(trial))
    if family == "mixtral":
        assert_equal(trial)
