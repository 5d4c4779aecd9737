"""Cuts: every element has one place, shards put together are the whole; and what a plan cuts in each family."""

import itertools
import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from recipes.common.engine.startup import start_distributed
from recipes.common.model.decoder import PlanError, find_stack
from recipes.common.model.initial_weights import build_empty
from recipes.common.model.sharding import ShardSpec
from recipes.common.parallel.grid import build_grid
from recipes.common.parallel.tensor_parallel import plan_tensor_parallel, split_embedding
from recipes.common.recipe import Layout
from tests.support.tiny import tiny_config
from tools.common.forked_ranks import run_ranks

# (length, packs): divided by the sizes or not, one block or several, shorter than the number of ranks
LENGTHS = [(12, 1), (131, 1), (12, 2), (12, 3), (3, 1), (1, 1), (10, 2)]
SIZES = (1, 2, 3, 4, 8)


@pytest.mark.parametrize(("length", "packs"), LENGTHS)
@pytest.mark.parametrize("size", SIZES)
def test_pieces_cover_every_element_once(length, packs, size):
    cut, seen = ShardSpec(0, packs), []
    for rank in range(size):
        pieces = cut.pieces(length, rank, size)
        local = [place for here, _, count in pieces for place in range(here, here + count)]
        assert len(set(local)) == len(local)
        assert all(0 <= place < cut.local_length(length, size) for place in local)
        seen += [place for _, there, count in pieces for place in range(there, there + count)]
    assert sorted(seen) == list(range(length))


def test_taken_shards_make_the_whole_again():
    assert run_ranks(_round_trips, 1) == [[]]


def _round_trips():
    """Cases that fail: each shard against torch's own chunks where those exist, and all of them put back."""
    failed = []
    for (length, packs), size, dim in itertools.product(LENGTHS, SIZES, (0, 1, 2)):
        shape = [2, 3, 4]
        shape[dim] = length
        whole, cut = torch.randn(shape), ShardSpec(dim, packs)
        shards, back = [cut.take(whole, rank, size) for rank in range(size)], torch.full(shape, float("nan"))
        for rank, shard in enumerate(shards):
            kept = torch.zeros_like(shard)
            for here, there, count in cut.pieces(length, rank, size):
                back.narrow(dim, there, count).copy_(shard.narrow(dim, here, count))
                kept.narrow(dim, here, count).fill_(1.0)
            if not (shard * (1 - kept)).eq(0).all():
                failed.append(("padding is not zero", length, packs, size, dim))
        if not back.equal(whole) or {shard.shape[dim] for shard in shards} != {cut.local_length(length, size)}:
            failed.append((length, packs, size, dim))
        if (length // packs) % size == 0:
            blocks = whole.chunk(packs, dim)
            wanted = [torch.cat([block.chunk(size, dim)[rank] for block in blocks], dim) for rank in range(size)]
            failed += [("chunks", length, packs, size, dim)] * any(not a.equal(b) for a, b in zip(shards, wanted, strict=True))
    return failed


CUTS = {
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


@pytest.mark.parametrize("family", CUTS)
def test_what_a_plan_cuts(family):
    cuts, names = run_ranks(_cuts, 1, tiny_config(family), 2)[0]
    assert set(cuts) <= set(names)
    for name, cut in CUTS[family].items():
        assert name in names
        assert cuts.get(name) == cut, name
    assert run_ranks(_cuts, 1, tiny_config(family), 1)[0][0].keys() == set()


def _cuts(config, size):
    causal = build_empty(config, "eager")
    return plan_tensor_parallel(causal, find_stack(causal), size).cuts, [name for name, _ in causal.named_parameters()]


@pytest.mark.parametrize(
    ("family", "fields", "size", "message"),
    [
        ("llama", {}, 3, r"num_attention_heads=4 is not a multiple of tensor=3"),
        (
            "llama",
            {"intermediate_size": 98},
            4,
            r"gate_proj\.weight has length 98 in its cut dimension: not a multiple of tensor=4",
        ),
        (
            "llama",
            {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2},
            3,
            r"k_proj has 2 key/value heads: tensor=3 must divide them or be a multiple of them",
        ),
        ("gpt2", {}, 3, r"num_attention_heads=4 is not a multiple of tensor=3"),
        ("mixtral", {"intermediate_size": 94}, 4, r"has length 94 in its cut dimension"),
    ],
)
def test_shapes_that_cannot_be_cut_are_refused(family, fields, size, message):
    assert re.search(message, run_ranks(_refusal, 1, tiny_config(family, **fields), size)[0])


def _refusal(config, size):
    try:
        _cuts(config, size)
    except PlanError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(("kv_heads", "size", "share"), [(4, 2, 1), (2, 2, 1), (2, 4, 2), (1, 4, 4), (1, 2, 2)])
def test_ranks_that_share_a_key_value_head(kv_heads, size, share):
    assert run_ranks(_kv_share, 1, tiny_config("llama", num_key_value_heads=kv_heads), size) == [share]


def _kv_share(config, size):
    causal = build_empty(config, "eager")
    return plan_tensor_parallel(causal, find_stack(causal), size).kv_share


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("padding", [None, 0, 130])
def test_a_split_embedding_looks_up_what_the_whole_does(size, padding):
    assert run_ranks(_embedding, size, padding) == [[True, True]] * size


def _embedding(padding):
    """[values equal, gradient equal]; a padding id has no gradient, wherever its row lies."""
    start_distributed("cpu")
    rank, size = dist.get_rank(), dist.get_world_size()
    grid = build_grid(Layout(tensor=size), torch.device("cpu"))
    torch.manual_seed(0)
    weight, ids = torch.randn(131, 8), torch.randint(0, 131, (4, 9))
    ids[0, :2] = torch.tensor([0, 130])
    scale, plain = torch.randn(4, 9, 8), weight.clone().requires_grad_()
    module = nn.Embedding(131, 8, padding_idx=padding)
    module.weight = nn.Parameter(ShardSpec(0).take(weight, rank, size))
    split_embedding(module, grid)
    found, wanted = module(ids), F.embedding(ids, plain, padding_idx=padding)
    (found * scale).sum().backward()
    (wanted * scale).sum().backward()
    return [found.equal(wanted), module.weight.grad.allclose(ShardSpec(0).take(plain.grad, rank, size))]
