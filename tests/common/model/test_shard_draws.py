"""Shards drawn by tiles are those of the whole; what `_init_weights` does beyond that is seen."""

import math
from types import SimpleNamespace

import pytest
import torch

from recipes.common.model.shard_draws import Call, draw_shard, drawn_elements, recorded_calls
from recipes.common.model.sharding import RankShard, ShardSpec
from tools.common.forked_ranks import run_ranks


@pytest.mark.parametrize(
    ("whole", "spec", "size"),
    [((300, 520), ShardSpec(0), 4), ((300, 520), ShardSpec(1), 4), ((3, 300, 260), ShardSpec(1, packs=2), 3),
     ((70_001,), ShardSpec(0), 2)],
)  # fmt: skip
def test_a_shard_is_what_it_is_of_the_whole(whole, spec, size):
    assert run_ranks(_differing, 1, whole, spec, size) == [[]]


def _differing(whole, spec, size):
    failed = []
    for call in (Call("normal_", (0.5, 2.0)), Call("uniform_", (-3.0,)), Call("fill_", (7.0,))):
        full = draw_shard(1, "w", [call], whole, RankShard())
        shards = [draw_shard(1, "w", [call], whole, RankShard(spec, rank, size)) for rank in range(size)]
        failed += [(call, rank) for rank, shard in enumerate(shards) if not shard.equal(spec.take(full, rank, size))]
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
    drawn = [drawn_elements(whole, RankShard(spec, rank, 8)) for rank in range(8)]
    assert math.prod(whole) / 8 <= max(drawn) <= 1.03 * math.prod(whole) / 8


def test_what_shards_cannot_repeat_is_seen():
    """A parameter left alone, read, drawn in parts or transposed."""
    assert run_ranks(_recorded, 1) == [[True, False, False, False, False]]


def _recorded():
    def repeatable(change):
        linear = torch.nn.Linear(4, 4, bias=False, device="meta")
        return recorded_calls(SimpleNamespace(_init_weights=torch.no_grad()(change)), [("m", linear)]) is not None

    return [
        repeatable(lambda m: m.weight.normal_(0.0, 0.02)),
        repeatable(lambda m: None),
        repeatable(lambda m: m.weight.normal_().copy_(m.weight.mul(2))),
        repeatable(lambda m: (m.weight.normal_(), m.weight[0].zero_())),
        repeatable(lambda m: m.weight.T.normal_()),
    ]
