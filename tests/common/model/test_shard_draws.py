"""Shards drawn by tiles are those of the whole; what `_init_weights` does beyond that is seen."""

import math
from types import SimpleNamespace

import pytest
import torch

from recipes.common.model.shard_draws import Call, draw_shard, drawn_elements, recorded_calls
from recipes.common.model.sharding import HeldTensor, RankShard, ShardSpec, rank_shard
from tools.common.forked_ranks import run_ranks


@pytest.mark.parametrize(
    ("whole", "spec", "size", "parts"),
    [((300, 520), ShardSpec(0), 4, 1), ((300, 520), ShardSpec(1), 4, 1), ((3, 300, 260), ShardSpec(1, packs=2), 3, 1),
     ((70_001,), ShardSpec(0), 2, 1), ((4, 260, 260), None, 1, 2), ((4, 260, 260), ShardSpec(0), 2, 2),
     ((2, 300, 260), ShardSpec(1, packs=2), 2, 2)],
)  # fmt: skip
def test_what_a_rank_draws_is_what_it_holds_of_the_whole(whole, spec, size, parts):
    """Tensor ranks' shards, and the parts of banks of experts that expert ranks have of them."""
    assert run_ranks(_differing, 1, whole, spec, size, parts) == [[]]


def _differing(whole, spec, size, parts):
    failed, held = [], [HeldTensor(rank_shard(spec, rank, size), part, parts) for rank in range(size) for part in range(parts)]
    for call in (Call("normal_", (0.5, 2.0)), Call("uniform_", (-3.0,)), Call("fill_", (7.0,))):
        full = draw_shard(1, "w", [call], whole, HeldTensor(RankShard()))
        failed += [(call, own) for own in held if not draw_shard(1, "w", [call], whole, own).equal(own.take(full))]
        if call.name == "normal_" and not (abs(full.mean() - 0.5) < 0.05 and abs(full.std() - 2.0) < 0.05):
            failed.append((call, full.mean(), full.std()))
        if call.name == "uniform_" and not (-3.0 <= full.min() < -2.9 and 0.9 < full.max() <= 1.0):
            failed.append((call, full.min(), full.max()))
    return failed


@pytest.mark.parametrize(
    ("whole", "spec"),
    [((53248, 16384), ShardSpec(0)), ((16384, 53248), ShardSpec(1)), ((8, 28672, 4096), ShardSpec(1, packs=2)),
     ((128_256, 16_384), ShardSpec(0))],
)  # fmt: skip
def test_a_rank_draws_little_more_than_its_shard(whole, spec):
    """Llama 405B's MLP over 8 ranks, by rows and by columns, a bank of experts, a vocabulary: counted, not drawn."""
    drawn = [drawn_elements(whole, HeldTensor(RankShard(spec, rank, 8))) for rank in range(8)]
    assert math.prod(whole) / 8 <= max(drawn) <= 1.03 * math.prod(whole) / 8


@pytest.mark.parametrize("spec", [None, ShardSpec(0), ShardSpec(1, packs=2)])
def test_an_expert_rank_draws_its_own_experts(spec):
    """And no other: a bank of DeepSeek-V3 over 8 expert ranks, whole, as whole experts of two tensor ranks, sliced by them."""
    whole, size = (256, 4096, 7168), 1 if spec is None else 2
    assert drawn_elements(whole, HeldTensor(rank_shard(spec, 0, size), 5, 8)) == math.prod(whole) // (8 * size)


def test_what_shards_cannot_repeat_is_seen():
    """A parameter left alone, alone or beside another, read, drawn in parts or transposed."""
    assert run_ranks(_recorded, 1) == [[True, True, False, False, False, False, False]]


def _recorded():
    def repeatable(change, bias=False):
        linear = torch.nn.Linear(4, 4, bias=bias, device="meta")
        return recorded_calls(SimpleNamespace(_init_weights=torch.no_grad()(change)), [("m", linear)]) is not None

    return [
        repeatable(lambda m: m.weight.normal_(0.0, 0.02)),
        repeatable(lambda m: (m.weight.normal_(), m.bias.zero_()), bias=True),
        repeatable(lambda m: None),
        repeatable(lambda m: m.weight.normal_(), bias=True),
        repeatable(lambda m: m.weight.normal_().copy_(m.weight.mul(2))),
        repeatable(lambda m: (m.weight.normal_(), m.weight[0].zero_())),
        repeatable(lambda m: m.weight.T.normal_()),
    ]
