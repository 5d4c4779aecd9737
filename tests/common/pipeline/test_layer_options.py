"""A rank's layers do what its layout asks of them."""

import torch
from transformers import AutoModelForCausalLM

from recipes.common.model.linears import plain_linears
from recipes.common.pipeline.layer_options import route_work
from tests.support.tiny import tiny_config
from tools.common.forked_ranks import run_ranks


def deferred_by_chunk() -> list[set[str]]:
    """Return the names of the weights that each chunk's store holds after a backward pass of the whole model."""
    model = AutoModelForCausalLM.from_config(tiny_config("llama", num_hidden_layers=3))
    layers = dict(enumerate(model.model.layers))
    stores = route_work(model, layers, (range(2), range(2, 3)), "zero_bubble", by_torch=False, kernels="none")
    for store in stores:
        store.begin()
    model(torch.arange(6)[None]).logits.sum().backward()
    return [{name for name, weight in model.named_parameters() if weight in store.weights} for store in stores]


def test_every_linear_of_a_chunk_defers_its_weight_gradient_to_that_chunks_store():
    model = AutoModelForCausalLM.from_config(tiny_config("llama", num_hidden_layers=3))
    names = {linear: name for name, linear in model.model.layers.named_modules()}
    expected = [
        {f"model.layers.{names[linear]}.weight" for index in chunk for linear in plain_linears(model.model.layers[index])}
        for chunk in (range(2), range(2, 3))
    ]
    assert [len(each) for each in expected] == [14, 7]
    assert run_ranks(deferred_by_chunk, 1)[0] == expected
