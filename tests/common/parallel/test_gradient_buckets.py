"""Buckets of gradients: one order of reductions on all ranks, whatever order gradients come in; each rank has its own means."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from recipes.common.engine.startup import start_distributed
from recipes.common.parallel import gradient_buckets
from recipes.common.parallel.gradient_buckets import Bucket, GradientBuckets
from tools.common.forked_ranks import RankError, run_ranks


def made(late=()):
    """Three buckets of one parameter each over both ranks, and what is reduced from here on, in order."""
    start_distributed("cpu")
    parameters = [nn.Parameter(torch.zeros(4)) for _ in range(3)]
    flats = [torch.zeros(6) for _ in parameters]  # each with two elements of padding
    rank = dist.get_rank()
    buckets = GradientBuckets(
        [
            Bucket(flat=flat, own=flat[3 * rank : 3 * rank + 3], group=dist.group.WORLD, parameters=(parameter,), after=0.5)
            for flat, parameter in zip(flats, parameters, strict=True)
        ],
        [parameters[index] for index in late],
    )
    started, real = [], gradient_buckets.start_reduction

    def start_reduction(flat, own, group):
        started.append(next(index for index, each in enumerate(flats) if each is flat))
        return real(flat, own, group)

    gradient_buckets.start_reduction = start_reduction
    return buckets, parameters, flats, started


def two_steps(late):
    """Rank 1's gradients come in the reverse order, each in two parts; in the second step the middle parameter has none."""
    buckets, parameters, flats, started = made(late)
    seen = []
    for step, indices in enumerate(((0, 1, 2), (0, 2))):
        buckets.expect(set(parameters))
        for index in indices if dist.get_rank() == 0 else indices[::-1]:
            gradient = torch.arange(4.0) + 10 * index + 100 * step + 2 * dist.get_rank()
            for part in (0.25 * gradient, 0.75 * gradient):
                if buckets.adding(parameters[index]):
                    flats[index][:4] = part
                else:
                    flats[index][:4] += part
            buckets.added(parameters[index])
        buckets.complete(set(parameters))
        early = len(started)
        buckets.finish()
        rank = dist.get_rank()
        seen.append((early, list(started), [flat[3 * rank : 3 * rank + 3].tolist() for flat in flats]))
        started.clear()
        for flat in flats:
            flat.mul_(torch.nan)  # as clipping by a norm of NaN does: nothing of a step reaches the next
        buckets.clear()
    return rank, seen


@pytest.mark.parametrize(("late", "order", "early"), [((), [0, 1, 2], 3), ((0,), [1, 2, 0], 2)])
def test_every_rank_starts_reductions_in_one_order_and_has_the_means_of_its_parts(late, order, early):
    for rank, (first, second) in run_ranks(two_steps, 2, late):
        for step, (seen, without) in enumerate(((first, ()), (second, (1,)))):
            flats = [[*(element + 1.0 + 10 * index + 100 * step for element in range(4)), 0.0, 0.0] for index in range(3)]
            means = [[0.0] * 3 if index in without else flat[3 * rank : 3 * rank + 3] for index, flat in enumerate(flats)]
            assert seen == (early, order, means)


def a_gradient_too_many():
    buckets, parameters, _, _ = made()
    buckets.expect(set(parameters))
    buckets.added(parameters[0])
    buckets.adding(parameters[0])


def test_a_gradient_after_the_last_one_is_not_lost_in_silence():
    with pytest.raises(RankError, match="a gradient after the last one"):
        run_ranks(a_gradient_too_many, 2)
