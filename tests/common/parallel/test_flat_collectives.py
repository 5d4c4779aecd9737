"""Flat tensors are summed and gathered in equal parts; on CPUs each element of a sum goes to its owner alone."""

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from recipes.common.engine.startup import start_distributed
from recipes.common.parallel.flat_collectives import start_gather, start_reduction
from tools.common.forked_ranks import run_ranks

PART = 5


def terms(rank, ranks):
    """One rank's gradients: values of which fp32 sums depend on the order."""
    return torch.randn(ranks * PART, generator=torch.Generator().manual_seed(rank)) * 10.0 ** (3 * rank)


def _summed(precision):
    start_distributed("cpu")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    flat = terms(rank, ranks)
    own = flat[rank * PART : (rank + 1) * PART]
    whole = torch.zeros(ranks * PART, dtype=precision)
    mine = whole[rank * PART : (rank + 1) * PART]
    mine.copy_(torch.arange(PART) + 0.5 + 8 * rank)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        under_way = start_reduction(flat, own, dist.group.WORLD), start_gather(whole, mine, dist.group.WORLD)
        results = [each.result() for each in under_way]
    assert results[0] is own
    assert results[1] is whole
    return own, whole, {event.key for event in seen.key_averages() if event.key.startswith("gloo:")}


@pytest.mark.parametrize(("ranks", "precision"), [(2, torch.bfloat16), (3, torch.float32), (4, torch.float16)])
def test_owners_have_the_sum_in_the_order_of_ranks_and_everybody_has_every_part(ranks, precision):
    total = torch.stack([terms(rank, ranks) for rank in range(ranks)]).sum(0)
    parts = torch.cat([torch.arange(PART) + 0.5 + 8 * rank for rank in range(ranks)]).to(precision)
    for rank, (own, whole, sent) in enumerate(run_ranks(_summed, ranks, precision)):
        assert own.equal(total[rank * PART : (rank + 1) * PART])
        assert whole.equal(parts)
        assert sent == {"gloo:all_to_all", "gloo:broadcast"}
