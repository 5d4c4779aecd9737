"""The order of sequences: a permutation each epoch, uniform, frozen, and what a plain reading of the paper gives."""

from itertools import permutations

import numpy as np
import pytest

from recipes.common.data.order import MIN_BITS, ROUNDS, permute, sequence_position


@pytest.mark.parametrize("n", [1, 2, 3, 7, 255, 256, 257, 1000, 65_537, 300_000])
def test_every_position_once_in_each_epoch(n):
    index = np.arange(3 * n)
    epochs = sequence_position(11, index, n).reshape(3, n)
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(n))
    if n > 7:
        assert not np.array_equal(epochs[0], epochs[1])


def plain_permute(index, n, seed, epoch):
    """A Feistel network and its cycle, one whole number at a time: no arrays, no 64-bit wrap-around but by hand."""

    def mix(value):
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
        return value ^ (value >> 31)

    golden = 0x9E3779B97F4A7C15
    start = mix(mix(seed) ^ ((epoch + 1) * golden) % 2**64)
    half = 2 ** -(-max(MIN_BITS, (n - 1).bit_length()) // 2)
    while True:
        left, right = divmod(index, half)
        for step in range(1, ROUNDS + 1):
            left, right = right, left ^ mix((right + mix((start + step * golden) % 2**64)) % 2**64) % half
        index = left * half + right
        if index < n:
            return index


@pytest.mark.parametrize("n", [1, 5, 1000, 10**12])
def test_it_is_the_network_of_the_paper(n):
    index = np.arange(min(n, 300)) * (n // min(n, 300))
    expected = [plain_permute(int(i), n, seed=5, epoch=3) for i in index]
    assert permute(index, n, seed=5, epoch=3).tolist() == expected


def test_pure_function_of_seed_and_index():
    n = 1000
    whole = sequence_position(7, np.arange(2500), n)
    one_by_one = [int(sequence_position(7, i, n)[0]) for i in range(2500)]
    assert whole.tolist() == one_by_one
    assert not np.array_equal(whole[:n], sequence_position(8, np.arange(n), n))
    assert np.array_equal(sequence_position(-1, np.arange(9), n), sequence_position(2**64 - 1, np.arange(9), n))


def test_golden_values():
    """A change here changes what every resumed run reads."""
    assert sequence_position(1234, np.arange(8), 1000).tolist() == GOLDEN_1000
    assert sequence_position(1234, np.arange(4) + 10**12, 10**12).tolist() == GOLDEN_10_12


def test_tiny_sets_reach_every_order_equally():
    """Chi-squared over the 24 orders of 4: 23 degrees of freedom, 49.7 is the 0.1 % point."""
    counts = dict.fromkeys(permutations(range(4)), 0)
    for seed in range(1200):
        counts[tuple(permute(np.arange(4), 4, seed=seed, epoch=0).tolist())] += 1
    assert sum((count - 50) ** 2 / 50 for count in counts.values()) < 49.7


def test_large_sets_are_uniform():
    """Index against position in a 16 x 16 table, and neighbours far apart: 225 degrees of freedom, 0.1 % point 295."""
    n = 1 << 16
    position = permute(np.arange(n), n, seed=3, epoch=0)
    table = np.zeros((16, 16))
    np.add.at(table, (np.arange(n) * 16 // n, position * 16 // n), 1)
    expected = n / 256
    assert ((table - expected) ** 2 / expected).sum() < 295
    steps = np.abs(np.diff(position))
    assert abs(steps.mean() / n - 1 / 3) < 0.01  # two uniform points are a third apart
    assert (np.diff(position) == 1).sum() < 10
    assert (position == np.arange(n)).sum() < 10  # about one is expected


def test_bad_input_is_an_error():
    with pytest.raises(ValueError, match="num_positions=0"):
        sequence_position(1, 0, 0)
    with pytest.raises(ValueError, match="index=-1"):
        sequence_position(1, -1, 10)
    with pytest.raises(ValueError, match="outside"):
        permute(np.array([10]), 10, seed=1, epoch=0)


GOLDEN_1000 = [562, 799, 153, 462, 865, 511, 575, 271]
GOLDEN_10_12 = [543232195676, 362237095048, 415503496770, 763865372114]
