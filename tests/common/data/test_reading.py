"""After a change of order, what is left of the epoch comes once, in the new order, and no token that was read comes again."""

import numpy as np
import pytest

from recipes.common.data.order import permute, sequence_position, unpermute
from recipes.common.data.reading import PIECE, PastOrder, Reading, SourceOrder, unread


@pytest.mark.parametrize("n", [1, 2, 7, 255, 1000, 65_537, 10**12])
def test_unpermute_undoes_permute(n):
    index = np.unique(np.linspace(0, n - 1, 500).astype(np.int64))
    there = permute(index, n, seed=3, epoch=2)
    assert np.array_equal(unpermute(there, n, seed=3, epoch=2), index)


def tokens_of(positions, seq_len):
    return {token for p in positions for token in range(p * seq_len, (p + 1) * seq_len)}


@pytest.mark.parametrize(("old", "new"), [(16, 32), (32, 16), (12, 20), (16, 16)])
def test_what_is_left_comes_once_and_then_whole_epochs(old, new):
    tokens, seed = 40_000, 5
    n_old, n_new = tokens // old, tokens // new
    read = tokens_of(sequence_position(seed, np.arange(2 * n_old, 2 * n_old + 300), n_old).tolist(), old)  # in epoch 2
    past = PastOrder(seed=seed, seq_len=old, num_positions=n_old, epoch=2, ranges=((0, 300),))
    order = SourceOrder(n_new, new, Reading(epoch=2, past=(past,)))
    left = [p for p in range(n_new) if not tokens_of([p], new) & read]
    positions = order.positions(6, np.arange(len(left) + n_new))
    assert sorted(positions[: len(left)].tolist()) == left
    assert sorted(positions[len(left) :].tolist()) == list(range(n_new))
    one_by_one = SourceOrder(n_new, new, Reading(epoch=2, past=(past,)))
    assert [int(one_by_one.positions(6, np.array([i]))[0]) for i in (len(left), 3, 0)] == positions[[len(left), 3, 0]].tolist()


def test_a_second_change_knows_both_orders_before_it():
    """16, then 20, then 16 tokens: what the second order passed over is not taken for read."""
    n16, n20 = 1250, 1000  # of 20,000 tokens
    first = PastOrder(seed=1, seq_len=16, num_positions=n16, epoch=0, ranges=((0, 200),))
    read = tokens_of(sequence_position(1, np.arange(200), n16).tolist(), 16)
    second = SourceOrder(n20, 20, Reading(past=(first,)))
    read |= tokens_of(second.positions(2, np.arange(150)).tolist(), 20)
    stop = int(second.index(2, np.array([150]))[0])
    past = (first, PastOrder(seed=2, seq_len=20, num_positions=n20, epoch=0, ranges=((0, stop),)))
    free = unread(np.arange(n16), 16, past)
    assert [p for p in range(n16) if free[p]] == [p for p in range(n16) if not tokens_of([p], 16) & read]
    assert stop > 150  # some were passed over


def test_more_than_a_piece():
    n = 2 * PIECE + 1000
    past = PastOrder(seed=1, seq_len=8, num_positions=n, epoch=0, ranges=((0, PIECE),))
    order = SourceOrder(n, 8, Reading(past=(past,)))
    numbers = np.array([n - PIECE - 1, PIECE, 0, PIECE + 999, n - PIECE])
    index = order.index(2, numbers)
    assert index[4] == n  # the next epoch
    everything = unread(permute(np.arange(n), n, seed=2, epoch=0), 8, (past,))
    assert index[:4].tolist() == np.flatnonzero(everything)[numbers[:4]].tolist()


def test_without_a_change_it_is_the_order_of_before():
    order = SourceOrder(1000, 8, Reading())
    assert np.array_equal(order.positions(7, np.arange(2500)), sequence_position(7, np.arange(2500), 1000))
    with pytest.raises(ValueError, match="before this order began"):
        order.positions(7, np.array([-1]))
