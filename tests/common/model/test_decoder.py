"""The parts of a decoder are found by where they stand."""

from torch import nn
from transformers import AutoConfig

from recipes.common.model.decoder import find_stack
from recipes.common.model.initial_weights import build_empty
from recipes.common.parallel.tiny_model import shrink
from recipes.common.recipe import Layout
from tests.support.tiny import tiny_config
from tools.common.forked_ranks import run_ranks


def _layers(family):
    """The stack, where a layer holds a list as long as the list of layers (as many experts, say)."""
    causal = build_empty(tiny_config(family), "eager")
    first = causal.get_submodule(find_stack(causal).layers)[0]
    first.more = nn.ModuleList(nn.Identity() for _ in range(causal.config.num_hidden_layers))
    return find_stack(causal).layers


def test_a_list_inside_a_layer_is_not_the_stack():
    assert run_ranks(_layers, 1, "llama") == ["model.layers"]
    assert run_ranks(_layers, 1, "gpt2") == ["transformer.h"]


def _after(family):
    return find_stack(build_empty(shrink(AutoConfig.for_model(family), Layout()), "eager")).after


def test_a_norm_that_stands_before_the_layers_is_not_the_final_one():
    assert run_ranks(_after, 1, "trocr") == [()]  # it norms the embeddings
    assert run_ranks(_after, 1, "biogpt") == [("biogpt.layer_norm",)]
