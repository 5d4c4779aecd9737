"""Continues reading where a run's seq_len, seed or blend changed: no token that was read comes again in its epoch.

After such a change a source first gives what its epoch has left: those of its sequences no token of which was read, in the new
order. Whole epochs follow. Tokens next to one that was read, in the same new sequence, wait for the next epoch. All is a pure
function of the position, as without a change: `Order` is a few numbers in the checkpoint's state.json. What is left is counted
by undoing the old order's permutation, piece by piece as reading comes there.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from recipes.common.data.order import permute, sequence_position, unpermute

PIECE = 1 << 16  # sequences that are counted at a time, about 50 ms


@dataclass(frozen=True, kw_only=True)
class PastOrder:
    """The sequences of one epoch that an order gave before it ended, and those that it was to skip."""

    seed: int  # of the source
    seq_len: int
    num_positions: int
    epoch: int
    ranges: tuple[tuple[int, int], ...]  # indices within the epoch


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a source gave before `Order.since_step`."""

    identity: str = ""  # of the prepared folder (recipes.common.data.shards.data_identity)
    given: int = 0  # sequences in this same order
    epoch: int = 0  # in which this order begins ...
    past: tuple[PastOrder, ...] = ()  # ... and what earlier ones gave in it


NOTHING_READ = Reading()


@dataclass(frozen=True, kw_only=True)
class Order:
    """Where the present order of a run begins. The default is that of a run in which nothing changed."""

    since_step: int = 0
    start_seqs: int = 0  # the index of its first sequence: the tokens read before it, in sequences ...
    rest_tokens: int = 0  # ... and what they are more
    readings: Mapping[str, Reading] = field(default_factory=dict)  # by folder, as the recipe names it


UNCHANGED = Order()


def order_from_json(content: Mapping[str, Any]) -> Order:
    """Return an Order from what `dataclasses.asdict` and JSON made of it."""
    readings = {}
    for name, reading in content["readings"].items():
        past = tuple(PastOrder(**p | {"ranges": tuple((a, b) for a, b in p["ranges"])}) for p in reading["past"])
        readings[name] = Reading(**reading | {"past": past})
    return Order(**content | {"readings": readings})


class SourceOrder:
    """The order of one source's sequences, by their number since `Order.since_step`. Safe to use from several threads."""

    def __init__(self, num_positions: int, seq_len: int, reading: Reading) -> None:
        self._n, self._seq_len, self._reading = num_positions, seq_len, reading
        self._left: dict[int, list[int]] = {}  # by seed: how many of the epoch's sequences are left up to the end of each piece
        self._lock = threading.Lock()

    def positions(self, seed: int, numbers: np.ndarray) -> np.ndarray:
        """Return the positions in the source of its sequences `numbers`: int64 [k] -> int64 [k]."""
        return sequence_position(seed, self.index(seed, numbers), self._n)

    def index(self, seed: int, numbers: np.ndarray) -> np.ndarray:
        """Return their indices, epoch after epoch, as `sequence_position` counts them: int64 [k] -> int64 [k]."""
        if numbers.size and numbers.min() < 0:
            raise ValueError("a sequence from before this order began, when batch.seq_len, the seed or the data changed")
        first, numbers = self._reading.epoch * self._n, numbers + self._reading.given
        if not self._reading.past:
            return first + numbers
        with self._lock:
            counts = self._count(seed, int(numbers.max(initial=0)))
        index = first + self._n + numbers - counts[-1]  # where the epoch has nothing left
        pieces = np.searchsorted(counts, numbers, side="right")
        for piece in np.unique(pieces[pieces < len(counts)]).tolist():
            rows = np.flatnonzero(pieces == piece)
            before = counts[piece - 1] if piece else 0
            index[rows] = first + piece * PIECE + np.flatnonzero(self._is_left(seed, piece))[numbers[rows] - before]
        return index

    def _count(self, seed: int, number: int) -> list[int]:
        """Count what is left, up to the sequence `number` or the end of the epoch."""
        counts = self._left.setdefault(seed, [])
        while len(counts) * PIECE < self._n and (not counts or counts[-1] <= number):
            counts.append((counts[-1] if counts else 0) + int(self._is_left(seed, len(counts)).sum()))
        return counts

    def _is_left(self, seed: int, piece: int) -> np.ndarray:
        index = np.arange(piece * PIECE, min((piece + 1) * PIECE, self._n))
        positions = permute(index, self._n, seed=seed, epoch=self._reading.epoch)
        return unread(positions, self._seq_len, self._reading.past)


def unread(positions: np.ndarray, seq_len: int, past: tuple[PastOrder, ...]) -> np.ndarray:
    """Return of which of the sequences of `seq_len` tokens at `positions` no token was read: bool [k]."""
    free = np.ones(len(positions), dtype=bool)
    for number, order in enumerate(past):
        first = positions * seq_len // order.seq_len
        last = (positions * seq_len + seq_len - 1) // order.seq_len
        for step in range(int((last - first).max(initial=-1)) + 1):
            block = first + step
            rows = np.flatnonzero(free & (block <= np.minimum(last, order.num_positions - 1)))
            index = unpermute(block[rows], order.num_positions, seed=order.seed, epoch=order.epoch)
            inside = np.zeros(len(rows), dtype=bool)
            for start, stop in order.ranges:
                inside |= (start <= index) & (index < stop)
            # an order that followed another gave nothing of what that one had read
            free[rows] = ~(inside & unread(block[rows], order.seq_len, past[:number]))
    return free
