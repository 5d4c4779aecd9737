"""Sequence parallelism trains what plain transformers trains, keeps parts alone, and is refused where layers mix tokens."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from recipes.common.checks.family_trials import sequence_problems
from recipes.common.engine.startup import start_distributed
from recipes.common.parallel.collectives import gather_sequence, scatter_sequence
from recipes.common.parallel.grid import build_grid
from recipes.common.pipeline.stage import build_stage, plan_model
from recipes.common.recipe import Layout
from tests.support.parity import assert_equal, trial_of
from tests.support.tiny import tiny_config
from tools.common.forked_ranks import run_ranks
from tools.common.parity import gradient_trial

SHARED = Layout(tensor=2, sequence_parallel=True)


def shared_trial(config, pipeline, tensor, data, *, schedule="1f1b", **fields):
    trial = trial_of(config, pipeline, tensor, data, **fields)
    return replace(trial, layout=replace(trial.layout, sequence_parallel=True, pipeline_schedule=schedule))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "olmo2", "gpt2", "phi3"])
def test_gradients_of_every_family(family):
    pipeline, schedule = {"llama": (2, "1f1b"), "gpt2": (2, "zero_bubble")}.get(family, (1, "1f1b"))
    trial = shared_trial(tiny_config(family, num_hidden_layers=2), pipeline, 2, 1, schedule=schedule, global_seqs=2)
    assert_equal(gradient_trial(trial))


def test_adamw_with_data_ranks_ties_recomputation_and_a_zero_bubble():
    config = tiny_config("llama", tie_word_embeddings=True)
    assert_equal(shared_trial(config, 2, 2, 2, recompute="full", recompute_every=3, schedule="zero_bubble", steps=2))


def test_fewer_key_value_heads_than_tensor_ranks():
    assert_equal(gradient_trial(shared_trial(tiny_config("qwen3", num_key_value_heads=1), 1, 4, 1, micro_seqs=2)))


def test_biases_of_rows_count_every_token_once():
    config = tiny_config("llama", attention_bias=True, mlp_bias=True)
    assert_equal(gradient_trial(shared_trial(config, 1, 2, 1)))


def moves():
    """Gather, then half of a sum: values and gradients against the whole on one process."""
    start_distributed("cpu")
    group, rank, size = dist.new_group([0, 1]), dist.get_rank(), 2
    generator = torch.Generator().manual_seed(0)
    x, a, b, wanted_grad = (torch.randn(3, 4, 5, generator=generator) for _ in range(4))
    mine, plain = x.chunk(size, dim=1)[rank].clone().requires_grad_(), x.clone().requires_grad_()
    y = scatter_sequence(torch.sin(gather_sequence(mine, group, partial=True) * (a, b)[rank]), group, partial=True)
    wanted = torch.sin(plain * a) + torch.sin(plain * b)
    y.backward(wanted_grad.chunk(size, dim=1)[rank])
    wanted.backward(wanted_grad)
    one = scatter_sequence(x[:1], group)
    assert one.untyped_storage().nbytes() == x[:1].nbytes // size  # it keeps no more than itself
    pairs = [(y, wanted), (mine.grad, plain.grad)]
    return [torch.allclose(part, whole.chunk(size, dim=1)[rank], atol=1e-6) for part, whole in pairs]


def test_the_moves_are_those_of_the_whole():
    assert run_ranks(moves, 2) == [[True] * 2] * 2


def inputs_kept():
    """(shape of the input of the first MLP, whether the graph keeps it), without and with sequence parallelism."""
    device, found = start_distributed("cpu"), []
    for layout in (Layout(tensor=2), SHARED):
        planned = plan_model(tiny_config("llama"), layout, attention="eager")
        stage = build_stage(planned, build_grid(layout, device), layout, seq_len=16)
        inputs = []

        def record(module, args, inputs=inputs):
            inputs.append((tuple(args[0].shape), StorageWeakRef(args[0].untyped_storage())))

        stage.causal.model.layers[0].mlp.up_proj.register_forward_pre_hook(record)
        hidden = stage(torch.arange(3, 35).view(2, 16))
        ((shape, storage),) = inputs
        found.append((shape, not storage.expired()))
        hidden.sum().backward()
    return found


def test_a_block_keeps_only_its_part_of_the_gathered_input():
    assert run_ranks(inputs_kept, 2) == [[((2, 16, 64), True), ((2, 16, 64), False)]] * 2


def problems(family, mixing=False):
    if mixing:
        forward = LlamaRMSNorm.forward
        LlamaRMSNorm.forward = lambda self, x: forward(self, x) + x.mean(dim=1, keepdim=True)
    return sequence_problems(tiny_config(family), SHARED, "eager")


def test_a_layer_that_mixes_tokens_outside_its_blocks_is_refused():
    assert run_ranks(problems, 1, "llama")[0] == []
    (line,) = run_ranks(problems, 1, "llama", True)[0]
    assert "layers of model_type=llama mix tokens outside attention and MLP" in line
    assert line.endswith("use sequence_parallel=False")
