"""What a plan shards in each family, which shapes it refuses, and what sharded modules keep."""

import contextlib
import re

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from recipes.common.engine.startup import start_distributed
from recipes.common.model.decoder import PlanError, find_stack
from recipes.common.model.initial_weights import build_empty
from recipes.common.model.sharding import ShardSpec
from recipes.common.parallel.grid import build_grid
from recipes.common.parallel.tensor_parallel import plan_tensor_parallel
from recipes.common.pipeline.stage import build_stage, plan_model
from recipes.common.recipe import Layout
from tests.support.tiny import tiny_config
from tools.common.forked_ranks import run_ranks

SHARDS = {
    "llama": {
        "model.embed_tokens.weight": ShardSpec(0),
        "lm_head.weight": ShardSpec(0),
        "model.layers.3.self_attn.q_proj.weight": ShardSpec(0),
        "model.layers.3.self_attn.k_proj.weight": ShardSpec(0),
        "model.layers.3.self_attn.o_proj.weight": ShardSpec(1),
        "model.layers.3.mlp.down_proj.weight": ShardSpec(1),
        "model.layers.3.input_layernorm.weight": None,
        "model.norm.weight": None,
    },
    "gpt2": {  # Conv1D is [in, out]; c_attn holds q, k and v one after another
        "transformer.wte.weight": ShardSpec(0),
        "transformer.wpe.weight": None,
        "transformer.h.0.attn.c_attn.weight": ShardSpec(1, 3),
        "transformer.h.0.attn.c_attn.bias": ShardSpec(0, 3),
        "transformer.h.0.attn.c_proj.weight": ShardSpec(0),
        "transformer.h.0.attn.c_proj.bias": None,
        "transformer.h.0.mlp.c_fc.bias": ShardSpec(0),
    },
    "phi3": {"model.layers.0.mlp.gate_up_proj.weight": ShardSpec(0), "model.layers.0.self_attn.o_proj.weight": ShardSpec(1)},
    "mixtral": {  # expert banks are [experts, out, in]; gate and up lie one after another
        "model.layers.0.mlp.experts.gate_up_proj": ShardSpec(1, 2),
        "model.layers.0.mlp.experts.down_proj": ShardSpec(2),
        "model.layers.0.mlp.gate.weight": None,
    },
}


@pytest.mark.parametrize("family", SHARDS)
def test_what_a_plan_shards(family):
    shards, names = run_ranks(_shards, 1, tiny_config(family), 2)[0]
    assert set(shards) <= set(names)
    for name, shard in SHARDS[family].items():
        assert name in names
        assert shards.get(name) == shard, name
    assert run_ranks(_shards, 1, tiny_config(family), 1)[0][0].keys() == set()


def _shards(config, size):
    causal = build_empty(config, "eager")
    return plan_tensor_parallel(causal, find_stack(causal), size).shards, [name for name, _ in causal.named_parameters()]


@pytest.mark.parametrize(
    ("family", "fields", "size", "message"),
    [
        ("llama", {}, 3, r"num_attention_heads=4 is not a multiple of tensor=3"),
        (
            "llama",
            {"intermediate_size": 98},
            4,
            r"gate_proj\.weight has length 98 in the dimension to shard: not a multiple of tensor=4",
        ),
        (
            "llama",
            {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2},
            3,
            r"k_proj has 2 key/value heads: tensor=3 must divide them or be a multiple of them",
        ),
        ("gpt2", {}, 3, r"num_attention_heads=4 is not a multiple of tensor=3"),
        ("mixtral", {"intermediate_size": 94}, 4, r"has length 94 in the dimension to shard"),
    ],
)
def test_shapes_that_cannot_be_sharded_are_refused(family, fields, size, message):
    assert re.search(message, run_ranks(_refusal, 1, tiny_config(family, **fields), size)[0])


def _refusal(config, size):
    try:
        _shards(config, size)
    except PlanError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(("kv_heads", "size", "ranks"), [(4, 2, 1), (2, 2, 1), (2, 4, 2), (1, 4, 4), (1, 2, 2)])
def test_ranks_that_share_a_key_value_head(kv_heads, size, ranks):
    assert run_ranks(_ranks_per_head, 1, tiny_config("llama", num_key_value_heads=kv_heads), size) == [ranks]


def _ranks_per_head(config, size):
    causal = build_empty(config, "eager")
    return plan_tensor_parallel(causal, find_stack(causal), size).ranks_per_kv_head


def _inputs_kept():
    """Whether the first MLP's input is still there after a forward pass, and after one that an exception has stopped."""
    layout = Layout(tensor=2)
    planned = plan_model(tiny_config("llama"), layout, attention="eager")
    stage = build_stage(planned, build_grid(layout, start_distributed("cpu")), layout, seq_len=16)
    mlp, inputs = stage.causal.model.layers[0].mlp, []
    mlp.register_forward_pre_hook(lambda module, args: inputs.append(StorageWeakRef(args[0].untyped_storage())))
    with torch.no_grad():
        stage(torch.arange(3, 35).view(2, 16))
        mlp.down_proj.forward = None  # cannot be called
        with contextlib.suppress(TypeError):
            stage(torch.arange(3, 35).view(2, 16))
    return [not storage.expired() for storage in inputs]


def test_columns_that_share_an_input_keep_it_during_the_call_alone():
    assert run_ranks(_inputs_kept, 2) == [[False, False]] * 2
