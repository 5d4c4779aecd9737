"""Computes the order in which sequences are read: a pure function of (seed, index). No index file, no state but one integer.

A Feistel network permutes 2**b >= n positions; walking its cycle until it lands under n gives a permutation of [0, n)
(Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Every epoch has its own key. The arithmetic is frozen:
changing one constant changes what every resumed run reads, so a test holds golden values. It shuffles; it hides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

ORDER_VERSION = 1  # of the permutation: a run's record holds it; a test holds what it stands for
ROUNDS = 8
MIN_BITS = 6  # tiny sets are permuted inside a larger domain: a network over 2 or 4 bits reaches too few permutations
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, splitmix64's increment
MASK_64 = (1 << 64) - 1


def mix(values: np.ndarray) -> np.ndarray:
    """Apply splitmix64's finalizer: uint64 [...] -> uint64 [...], a bijection that spreads every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def round_keys(seed: int, epoch: int) -> np.ndarray:
    """Return the keys of one epoch's permutation: uint64 [ROUNDS]."""
    start = mix(np.array([seed & MASK_64], dtype=np.uint64))
    start = mix(start ^ np.array([(epoch + 1) * GOLDEN & MASK_64], dtype=np.uint64))
    steps = np.arange(1, ROUNDS + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    return mix(start + steps)


def permute(index: np.ndarray, n: int, *, seed: int, epoch: int) -> np.ndarray:
    """Permute [0, n) under (seed, epoch): int64 [k] -> int64 [k]."""
    return _walk(index, n, round_keys(seed, epoch))


def unpermute(positions: np.ndarray, n: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return what `permute` took to `positions`: int64 [k] -> int64 [k]."""
    return _walk(positions, n, round_keys(seed, epoch), _network_back)


def sequence_position(seed: int, index: np.ndarray | int, num_positions: int) -> np.ndarray:
    """Return the positions of the sequences `index` (counted from the start of the run): int64 [k] -> int64 [k].

    Every position comes once in each epoch of `num_positions` sequences, in another order in each.
    Raises ValueError for an empty set or a negative index.
    """
    index = np.atleast_1d(np.asarray(index, dtype=np.int64))
    if num_positions < 1:
        raise ValueError(f"num_positions={num_positions}: there is nothing to order")
    if index.size and index.min() < 0:
        raise ValueError(f"index={index.min()}: sequences are counted from 0")
    epochs = index // num_positions
    positions = np.empty_like(index)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        within = index[chosen] - epoch * num_positions
        positions[chosen] = permute(within, num_positions, seed=seed, epoch=int(epoch))
    return positions


def kept_index(consumed: np.ndarray, skips: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return the index of the n-th sequence that is not skipped: int64 [k] -> int64 [k].

    `skips` are ranges [start, stop) of indices, in any order. A skip changes nothing before its start, so a run that
    resumes from a checkpoint before a range and skips it reads what it read before, up to there.
    """
    consumed = np.atleast_1d(np.asarray(consumed, dtype=np.int64))
    merged = merge_skips(skips)
    lengths = np.cumsum([0] + [stop - start for start, stop in merged])
    kept_before = np.array([start for start, _ in merged], dtype=np.int64) - lengths[:-1]
    return consumed + lengths[np.searchsorted(kept_before, consumed, side="right")]


def merge_skips(skips: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return the same ranges sorted, disjoint and not touching. Raises ValueError for a range that is none."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(skips):
        if not 0 <= start < stop:
            raise ValueError(f"skip ({start}, {stop}): a range of sequences is start < stop, counted from 0")
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)


def _network(values: np.ndarray, half_bits: np.uint64, keys: np.ndarray) -> np.ndarray:
    low = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & low
    for key in keys:
        left, right = right, left ^ (mix(right + key) & low)
    return (left << half_bits) | right


def _network_back(values: np.ndarray, half_bits: np.uint64, keys: np.ndarray) -> np.ndarray:
    low = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & low
    for key in keys[::-1]:
        left, right = right ^ (mix(left + key) & low), left
    return (left << half_bits) | right


def _walk(
    index: np.ndarray, n: int, keys: np.ndarray, network: Callable[[np.ndarray, np.uint64, np.ndarray], np.ndarray] = _network
) -> np.ndarray:
    """Apply the network until every value is under n: under 4 rounds on average, unless n is tiny."""
    index = np.atleast_1d(np.asarray(index))
    if index.size and not (index.min() >= 0 and index.max() < n):
        raise ValueError(f"index from {index.min()} to {index.max()} is outside [0, {n})")
    half_bits = np.uint64((max((n - 1).bit_length(), MIN_BITS) + 1) // 2)
    values = network(index.astype(np.uint64), half_bits, keys)
    while (outside := np.flatnonzero(values >= np.uint64(n))).size:
        values[outside] = network(values[outside], half_bits, keys)
    return values.astype(np.int64)
