"""What stands in for other stages' modules keeps what the rest of the model reads of them."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from recipes.common.model.decoder import find_stack
from recipes.common.parallel.tiny_model import shrink
from recipes.common.pipeline.placeholders import run_head
from recipes.common.recipe import Layout
from tools.common.forked_ranks import run_ranks


def _logits():
    config = shrink(AutoConfig.for_model("falcon_h1", lm_head_multiplier=0.5), Layout())
    causal = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    hidden, base = torch.randn(1, 3, config.hidden_size), causal.model
    found = run_head(causal, find_stack(causal), hidden)
    return found.equal(causal.lm_head(hidden) * 0.5), causal.model is base


def test_a_head_that_scales_by_a_number_of_the_base_model_runs_without_it():
    assert run_ranks(_logits, 1)[0] == (True, True)


def _of_an_inner_model():
    config = shrink(AutoConfig.for_model("opt"), Layout())
    causal = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ids = torch.arange(3, 11).view(1, 8)
    with torch.no_grad():
        hidden = causal.model.decoder(input_ids=ids).last_hidden_state
        return run_head(causal, find_stack(causal), hidden).equal(causal(ids).logits)


def test_a_head_that_calls_a_model_in_its_base_model_runs_without_it():
    assert run_ranks(_of_an_inner_model, 1)[0]
