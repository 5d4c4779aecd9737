"""A product takes whole waves of tiles, what its bytes take, or less where its depth can be divided."""

import numpy as np
import pytest

from tools.plan.products import TILE, product_seconds, training_seconds

GPU = {"units": np.array(100.0), "rate": np.array(1e14), "bandwidth": np.array(1e13)}  # bandwidth enough for all but one test
TILE_SECONDS = 2.0 * TILE**2 / 1e12  # a unit of depth


def _seconds(rows, columns, depth, groups=1, **changed):
    sizes = (np.array(float(size)) for size in (rows, columns, depth))
    return float(product_seconds(*sizes, groups=np.array(float(groups)), **(GPU | changed)))


@pytest.mark.parametrize(
    "rows, columns, depth, groups, waves",
    [
        (10 * TILE, 10 * TILE, 400, 1, 1),  # fills the units once
        (10 * TILE, 10 * TILE + 1, 400, 1, 2),  # a column more is a second wave
        (10 * TILE, 9 * TILE + 1, 400, 1, 1),  # a side that does not fill its tiles pays for them
        (TILE, TILE, 400, 1, 1),  # one tile takes as long as a hundred
        (TILE, TILE, 4096, 1, 1 / 8),  # unless its depth is divided
        (1, TILE, 400, 100, 1),  # experts with a token each
        (TILE, TILE, 4096, 8, 1),  # and theirs is not divided
    ],
)
def test_a_product_takes_whole_waves(rows, columns, depth, groups, waves):
    assert _seconds(rows, columns, depth, groups) == pytest.approx(waves * depth * TILE_SECONDS)


def test_a_large_product_takes_what_its_operations_take():
    assert _seconds(100 * TILE, 100 * TILE, 8192) == pytest.approx(2 * (100 * TILE) ** 2 * 8192 / 1e14)


@pytest.mark.parametrize("written", [2.0, 8.0])
def test_a_flat_product_takes_what_its_bytes_take(written):
    """Its result of 16 bits, or an fp32 sum that it reads and writes."""
    moved = 2.0 * (TILE * 16 + 16 * 8 * TILE) + written * TILE * 8 * TILE
    assert _seconds(TILE, 8 * TILE, 16, bandwidth=np.array(1e9), written=written) == pytest.approx(moved / 1e9)


def test_only_the_weights_gradient_is_added_to_a_sum():
    """Of few tokens, whose products take what their bytes take."""
    tokens, width, inner = (np.array(float(size)) for size in (16, 8 * TILE, 4 * TILE))
    options = {"repeated": np.array(0.0), "groups": np.array(1.0), **GPU, "bandwidth": np.array(1e9)}
    apart, inside = (float(training_seconds(tokens, width, inner, summed=summed, **options)) for summed in (2.0, 8.0))
    assert inside - apart == pytest.approx(6.0 * 8 * TILE * 4 * TILE / 1e9)


def test_training_multiplies_three_times_and_again_what_is_recomputed():
    sizes = np.array(100.0 * TILE), np.array(10.0 * TILE), np.array(20.0 * TILE)
    plain, again = (float(training_seconds(*sizes, np.array(by), groups=np.array(1.0), **GPU)) for by in (0.0, 1.0))
    once = float(2 * np.prod(sizes)) / 1e14
    assert plain == pytest.approx(3 * once) and again == pytest.approx(4 * once)
