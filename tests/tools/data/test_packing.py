"""Best-fit packing equals an oracle that looks at every bin."""

import numpy as np
import pytest

from tools.data.packing import best_fit, pack


def slow_best_fit(lengths, size):
    """Put the longest first, each into the fullest bin that takes it; return how full the bins are."""
    bins = []
    for length in sorted(lengths, reverse=True):
        fitting = [number for number, used in enumerate(bins) if used + length <= size]
        if fitting:
            bins[max(fitting, key=lambda number: bins[number])] += length
        else:
            bins.append(length)
    return sorted(bins)


@pytest.mark.parametrize("seed", range(20))
def test_bins_are_those_of_best_fit_decreasing(seed):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(5, 60))
    lengths = rng.integers(1, size + 1, rng.integers(1, 300)).tolist()
    bins = best_fit(lengths, size)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    assert sorted(sum(lengths[item] for item in items) for items in bins) == slow_best_fit(lengths, size)


def test_pack_keeps_every_token_and_its_origin():
    lengths = np.array([3, 10, 4, 1, 8])
    tokens = np.arange(1, 27)
    out, pieces, origins = pack(tokens, lengths, np.arange(5), size=4, fill=0)
    assert len(out) % 4 == 0 and pieces.sum() == len(out)
    assert sorted(out[out > 0].tolist()) == tokens.tolist()
    document_of = np.repeat(np.arange(5), lengths)
    for piece, origin in zip(np.split(out, np.cumsum(pieces)[:-1]), origins, strict=True):
        assert {int(document_of[token - 1]) for token in piece if token} == {int(origin)}
