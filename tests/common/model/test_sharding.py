"""Shards: every element has one place, and shards put together are the whole."""

import itertools

import pytest
import torch

from recipes.common.model.sharding import ShardSpec
from tools.common.forked_ranks import run_ranks

# (length, packs): divided by the sizes or not, one block or several, shorter than the number of ranks
LENGTHS = [(12, 1), (131, 1), (12, 2), (12, 3), (3, 1), (1, 1), (10, 2)]
SIZES = (1, 2, 3, 4, 8)


@pytest.mark.parametrize(("length", "packs"), LENGTHS)
@pytest.mark.parametrize("size", SIZES)
def test_ranges_cover_every_element_once(length, packs, size):
    spec, seen = ShardSpec(0, packs), []
    for rank in range(size):
        ranges = spec.ranges(length, rank, size)
        local = [index for start, _, count in ranges for index in range(start, start + count)]
        assert len(set(local)) == len(local)
        assert all(0 <= index < spec.local_length(length, size) for index in local)
        seen += [index for _, start, count in ranges for index in range(start, start + count)]
    assert sorted(seen) == list(range(length))


def test_taken_shards_make_the_whole_again():
    assert run_ranks(_round_trips, 1) == [[]]


def _round_trips():
    """Return cases that fail: each shard against torch's own chunks where those exist, and all of them put back."""
    failed = []
    for (length, packs), size, dim in itertools.product(LENGTHS, SIZES, (0, 1, 2)):
        shape = [2, 3, 4]
        shape[dim] = length
        whole, spec = torch.randn(shape), ShardSpec(dim, packs)
        shards, back = [spec.take(whole, rank, size) for rank in range(size)], torch.full(shape, float("nan"))
        for rank, shard in enumerate(shards):
            kept = torch.zeros_like(shard)
            for local, start, count in spec.ranges(length, rank, size):
                back.narrow(dim, start, count).copy_(shard.narrow(dim, local, count))
                kept.narrow(dim, local, count).fill_(1.0)
            if not (shard * (1 - kept)).eq(0).all():
                failed.append(("padding is not zero", length, packs, size, dim))
        if not back.equal(whole) or {shard.shape[dim] for shard in shards} != {spec.local_length(length, size)}:
            failed.append((length, packs, size, dim))
        if (length // packs) % size == 0:
            blocks = whole.chunk(packs, dim)
            wanted = [torch.cat([block.chunk(size, dim)[rank] for block in blocks], dim) for rank in range(size)]
            failed += [("chunks", length, packs, size, dim)] * any(not a.equal(b) for a, b in zip(shards, wanted, strict=True))
    return failed
