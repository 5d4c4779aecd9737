"""Jumps of the loss and missing shares of it are told from bends of the curve and from noise."""

from types import SimpleNamespace

import numpy as np
import pytest

from tools.spikes.evidence.case import expected
from tools.spikes.evidence.data import _jump, micro_batches

# steps 1 to 22 of a healthy run (tests.bench.spikes.planted, one layer, seed 3): from step 19 on it falls more slowly
BENT = (5.265, 5.241, 5.186, 5.122, 5.018, 4.933, 4.834, 4.722, 4.587, 4.468, 4.344,
        4.245, 4.062, 3.986, 3.874, 3.755, 3.638, 3.5, 3.453, 3.422, 3.365, 3.282)  # fmt: skip
ONSET = 20


def jump_of(losses):
    """Return (what `_jump` finds at step 20, how far that step is from its extrapolation, the curve's noise)."""
    case = SimpleNamespace(columns={"loss": losses}, steps=np.arange(1, len(losses) + 1), onset=ONSET)
    predicted, noise = expected(case.steps, losses, ONSET - 1)
    return _jump(case, predicted), losses[ONSET - 1] - predicted, noise


def test_a_curve_that_bends_has_not_jumped():
    found, off, noise = jump_of(np.array(BENT))
    assert off > 4 * noise  # its extrapolation alone would call it a jump
    assert found == pytest.approx(3.422 - (3.453 + 3.365) / 2) and found < noise


@pytest.mark.parametrize("nats", (0.5, -0.5))
def test_one_hard_step_is_as_far_off_as_it_was_moved(nats):
    losses = np.array(BENT)
    losses[ONSET - 1] += nats
    assert jump_of(losses)[0] == pytest.approx(nats, abs=0.13)


@pytest.mark.parametrize("steps", (1, 3), ids=("at the end", "and stays there"))
def test_a_loss_that_jumps_is_held_against_its_extrapolation(steps):
    losses = np.array(BENT)[: ONSET - 1 + steps]
    losses[ONSET - 1 :] += 0.5
    found, off, _ = jump_of(losses)
    assert found == off > 0.5


def weight_of(missing):
    """Return what `micro_batches` says of a step that lacks so many of 8 micro batches, after a level curve with noise."""
    losses = np.array([2.7 + 0.03 * (-1) ** step for step in range(32)])
    losses[-1] = 2.7 * (1 - missing / 8)
    steps = np.arange(1, 33)
    case = SimpleNamespace(
        columns={"loss": losses},
        steps=steps,
        recipe=SimpleNamespace(batch=SimpleNamespace(seq_len=32, micro_seqs=4)),
        layout={"data": 1},
        near_onset=lambda: [32],
        at=lambda name, step: 8 * 4 * 32,
    )
    (finding,) = micro_batches(case)
    return finding.weight


def test_a_share_that_is_no_whole_micro_batch_weighs_less():
    """Noise makes a share of any size, a lost micro batch one of 1/8."""
    assert [weight_of(missing) for missing in (1, 1.3, 0.7, 0.4)] == [5.0, 4.0, 2.0, -4.0]
