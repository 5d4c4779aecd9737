"""Sums over the fragments of a flat partition: they do not depend on where it is split, and none waits for a device."""

import pytest
import torch

from recipes.common.monitor.optimizer_sums import SUMS, add_sums, spans_of
from tools.common.forked_ranks import run_ranks

ADAM = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-3}


def adam_state(count, device, generator=None):
    step = torch.tensor(3.0, device=device)
    moments = (torch.randn(count, device=device, generator=generator), torch.rand(count, device=device, generator=generator))
    return {"step": step, "exp_avg": moments[0], "exp_avg_sq": moments[1].square() * 1e-3}


def test_pieces_of_one_parameter_add_up_and_what_is_left_out_stays_out():
    assert run_ranks(_pieces, 1) == [True]


def _pieces():
    generator = torch.Generator().manual_seed(1)
    count = (1 << 17) + 1000
    weight, gradient = torch.randn(count, generator=generator), torch.randn(count, generator=generator)
    gradient[::7] = 0.0
    state = adam_state(count, "cpu", generator)
    # out of order, with a hole from 90 to 100; row 1 has two parts
    ranges = [(2, 200, count), (1, 0, 90), (1, 100, 200)]
    out = torch.zeros(3, len(SUMS), dtype=torch.float64)
    add_sums(out, spans_of(ranges, "cpu", out.device), weight, gradient, state, ADAM)
    spread = state["exp_avg_sq"].double() / (1 - 0.99**3)
    quotient = state["exp_avg"].double() / (1 - 0.9**3) / (spread.sqrt() + 1e-3)
    before = (weight.double() + 1e-2 * quotient) / (1 - 1e-3)
    terms = torch.stack([
        gradient.double().square(), weight.double().square(), (weight - before).square(),
        gradient.double().square() / spread.clamp(min=1e-6), (spread.sqrt() < 1e-3).double(), (gradient == 0).double(),
    ])  # fmt: skip
    wanted = torch.stack(
        [torch.zeros(len(SUMS)).double(), terms[:, :90].sum(1) + terms[:, 100:200].sum(1), terms[:, 200:].sum(1)]
    )
    torch.testing.assert_close(out, wanted, rtol=5e-6, atol=1e-12)
    return True


@pytest.mark.parametrize("kind", ["adam", "sgd", "momentum"])
def test_nothing_waits_for_the_device(kind):
    """Meta tensors have no values: whatever would fetch one raises."""
    assert run_ranks(_without_values, 1, kind) == [(3, len(SUMS))]


def _without_values(kind):
    meta, count = torch.device("meta"), 5000
    weight, gradient = torch.empty(count, device=meta), torch.empty(count, device=meta)
    states = {
        "adam": adam_state(count, meta),
        "sgd": {"momentum_buffer": None},
        "momentum": {"momentum_buffer": gradient.clone()},
    }
    options = ADAM if kind == "adam" else {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9 if kind == "momentum" else 0.0}
    out = torch.zeros(3, len(SUMS), dtype=torch.float64, device=meta)
    spans = spans_of([(0, 0, 100), (1, 100, 4000), (2, 4500, 5000)], "cuda", meta)
    add_sums(out, spans, weight, gradient, states[kind], options)
    return tuple(out.shape)
