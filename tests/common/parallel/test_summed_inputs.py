"""A shared input's gradient travels while weight gradients are computed, and no bit depends on it."""

import contextlib
from dataclasses import replace
from unittest import mock

import torch
import torch.distributed as dist

from recipes.common.engine.startup import start_distributed
from recipes.common.model import linears
from recipes.common.model.shared_inputs import SharedInput
from recipes.common.parallel.collectives import UnderWay
from recipes.common.parallel.grid import build_grid
from recipes.common.pipeline.stage import build_stage, plan_model
from recipes.common.recipe import Layout
from tests.support.parity import trial_of
from tests.support.tiny import ds_config, tiny_config
from tools.common.forked_ranks import run_ranks
from tools.common.parity import train_in_layout

SEQ_LEN = 24  # no width of the model
SUM, GATHER, SCATTER = "all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"
INPUT, WEIGHT, WAIT = "input's gradient", "weight's gradient", "wait"


@contextlib.contextmanager
def recorded(events):
    """Record products by what they give, collectives by their name, in a tuple those that are only started, and waits."""

    def product(left, right, real=linears.product):
        events.append(INPUT if len(left) == SEQ_LEN else WEIGHT)
        return real(left, right)

    def result(self, real=UnderWay.result):
        events.append(WAIT)
        return real(self)

    def collective(name, real):
        def call(*tensors, async_op=False, **options):
            events.append((name,) if async_op else name)
            return real(*tensors, async_op=async_op, **options)

        return call

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(linears, "onednn_is_faster", lambda: True))  # there torch computes them
        stack.enter_context(mock.patch.object(linears, "_ONEDNN", replace(linears._ONEDNN, of_input=product, of_weight=product)))
        stack.enter_context(mock.patch.object(UnderWay, "result", result))
        for name in (SUM, GATHER, SCATTER):
            stack.enter_context(mock.patch.object(dist, name, collective(name, getattr(dist, name))))
        yield


def backward_events(options):
    """What the backward pass of a layer does, and the weights' pass that follows it in a schedule without bubbles."""
    device, events, layout = start_distributed("cpu"), [], Layout(tensor=2, **options)
    grid = build_grid(layout, device)
    stage = build_stage(plan_model(tiny_config("llama", num_hidden_layers=1), layout), grid, layout, seq_len=SEQ_LEN)
    with recorded(events):
        hidden = stage(torch.arange(3, 3 + SEQ_LEN).view(1, SEQ_LEN))
        for store in stage.weight_grad_stores:
            store.begin()
        events.clear()
        hidden.sum().backward()
        backward = [event for event in events if event != SUM]  # of norms' gradients
        events.clear()
        for store in stage.weight_grad_stores:
            store.compute_oldest()
    return backward, events


def order_of(**options):
    first, second = run_ranks(backward_events, 2, options)
    assert first == second, "ranks that start collectives in another order hang"
    return first


ROW, EMBEDDING = [INPUT, WEIGHT], [GATHER]


def test_a_sum_travels_beside_the_weight_gradients():
    mlp, attention = ([*ROW, *[INPUT] * count, (SUM,), *[WEIGHT] * count, WAIT] for count in (2, 3))
    assert order_of() == (mlp + attention, [])


def test_a_block_gathers_beside_its_inputs_gradient_and_scatters_beside_the_weights():
    mlp, attention = ([GATHER, *ROW, (GATHER,), *[INPUT] * count, (SCATTER,), WAIT, *[WEIGHT] * count, WAIT] for count in (2, 3))
    assert order_of(sequence_parallel=True) == (mlp + attention + EMBEDDING, [])


def test_deferred_gradients_gather_no_input_twice_and_each_factor_beside_the_product_before():
    mlp, attention = ([GATHER, INPUT, *[INPUT] * count, (SCATTER,), WAIT] for count in (2, 3))
    down = [(GATHER,), WAIT, (GATHER,), WEIGHT]
    up_and_gate = [WAIT, WEIGHT, (GATHER,), WEIGHT]
    out = [WAIT, (GATHER,), WEIGHT]
    queries_keys_and_values = [WAIT, WEIGHT, WEIGHT, WEIGHT]
    wanted = mlp + attention + EMBEDDING, down + up_and_gate + out + queries_keys_and_values
    assert order_of(sequence_parallel=True, pipeline_schedule="zero_bubble") == wanted


SEQUENCE = {"sequence_parallel": True, "micro_seqs": 2}
TRIALS = {
    "sequence": ("bf16", "llama", 1, 2, SEQUENCE),
    "sequence, recomputed": ("bf16", "llama", 1, 4, SEQUENCE | {"recompute": "full"}),
    "transposed, with biases, recomputed in part": ("bf16", "gpt2", 1, 2, {"recompute": "selective"}),
    "deferred": ("bf16", "llama", 2, 2, SEQUENCE | {"pipeline_schedule": "zero_bubble"}),
    "deferred, recomputed": ("fp32", "gpt2", 2, 2, SEQUENCE | {"pipeline_schedule": "zero_bubble", "recompute": "selective"}),
    "experts, MLP by parts": ("fp32", "mixtral", 1, 2, {"mlp_chunk_tokens": 8}),
}


def both_ways():
    """Of each trial, whether what training leaves is the same bits as with autograd's weight gradients."""
    same = {}
    for name, (precision, family, pipeline, tensor, fields) in TRIALS.items():
        config = tiny_config(family, num_hidden_layers=2, tie_word_embeddings=True)
        ds, data = ds_config(f"zero1_{precision}.json"), 4 // (pipeline * tensor)
        trial = trial_of(config, pipeline, tensor, data, deepspeed=ds, steps=1, **fields)
        left = train_in_layout(trial)
        with mock.patch.object(SharedInput, "reads_of", lambda *_: None):
            plain = train_in_layout(trial)
        shards = zip(left["shards"].values(), plain["shards"].values(), strict=True)
        numbers = left["losses"] == plain["losses"] and left["norms"] == plain["norms"]
        same[name] = numbers and all(a.equal(b) for a, b in shards)
    return same


def test_training_is_the_same_to_the_last_bit():
    for same in run_ranks(both_ways, 4):
        assert same == dict.fromkeys(TRIALS, True)


def kept_inputs():
    """A frozen input, one that no linear reads, and a step without gradients leave nothing behind."""
    device, layout = start_distributed("cpu"), Layout(tensor=2, sequence_parallel=True)
    stage = build_stage(
        plan_model(tiny_config("llama", num_hidden_layers=1), layout), build_grid(layout, device), layout, seq_len=SEQ_LEN
    )
    ids = torch.arange(3, 3 + SEQ_LEN).view(1, SEQ_LEN)
    with torch.no_grad():
        wanted = stage(ids)
    stage.causal.get_input_embeddings().weight.requires_grad_(False)
    hidden = stage(ids)
    hidden.sum().backward()
    layer = stage.causal.model.layers[0]
    shared = layer.self_attn.q_proj.shared_input
    return hidden.equal(wanted), layer.self_attn.q_proj.weight.grad is not None, shared._now is None


def test_a_frozen_embedding():
    assert run_ranks(kept_inputs, 2) == [(True, True, True)] * 2
