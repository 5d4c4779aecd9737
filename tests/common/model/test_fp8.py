"""Products in fp8: as defined, from any part of a matrix the same numbers, and nothing that is not finite is lost."""

from functools import partial

import pytest
import torch
from torch import nn

from recipes.common.model.fp8 import GRADIENTS, VALUES, Fp8Products, scale_of
from recipes.common.model.linears import defer_weight_gradients, route_products
from recipes.common.model.weight_grad_store import WeightGradStore
from tools.common.forked_ranks import run_ranks
from tools.common.fp8_oracle import fp8_linear


def trained(dtype, *, tokens=32, by_definition=False, defer=False):
    """Return the output of a linear, and the gradients of its input, weight and bias."""
    torch.manual_seed(0)
    module, x = nn.Linear(48, 64).to(dtype), torch.randn(2, tokens // 2, 48, dtype=dtype, requires_grad=True)
    store = WeightGradStore() if defer else None
    if by_definition:
        module.forward = partial(fp8_linear, module)
    else:
        route_products(module)
        defer_weight_gradients(module, store)
        module.in_fp8 = True
    out = module(x)
    if defer:
        store.begin()
    (out * torch.linspace(0.1, 3.0, 64).to(dtype)).square().sum().backward()
    if defer:
        assert module.weight.grad is None
        store.compute_oldest()
    return [out.detach(), x.grad, module.weight.grad, module.bias.grad]


@torch.no_grad()
def forward(x, matrix, bias=None):
    return Fp8Products(x, matrix).forward(x, matrix, bias)


def of_weight(gradients, rows):
    return Fp8Products(rows, torch.ones(16, 16)).of_weight(gradients, rows)


def compared():
    for dtype, rounding in ((torch.float32, 1e-6), (torch.bfloat16, 2.0**-8)):
        ours, theirs = trained(dtype), trained(dtype, by_definition=True)
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype == dtype
            assert torch.allclose(a, b, rtol=rounding, atol=rounding * b.abs().max().item() / 100)
    plain = nn.Linear(48, 64)
    plain.load_state_dict({"weight": torch.randn(64, 48), "bias": torch.randn(64)})
    x = torch.randn(32, 48)
    ours = forward(x, plain.weight, plain.bias)
    apart = (ours - plain(x)).norm() / plain(x).norm()
    assert 0.01 < apart < 0.06  # e4m3 rounds by a sixteenth at most: it is fp8, and no worse
    for a, b in zip(trained(torch.float32), trained(torch.float32, defer=True), strict=True):
        assert torch.equal(a, b)


def test_values_and_gradients_are_those_of_the_definition():
    run_ranks(compared, 1)


def parts():
    torch.manual_seed(0)
    whole = torch.randn(64, 96) * torch.logspace(-1, 1, 64)[:, None]  # shards differ in their largest elements
    for kind in (VALUES, GRADIENTS):
        scale = scale_of(whole, kind)
        cast, step = scale.cast(whole), scale.step
        rounded = cast.float() * step
        exact = whole.abs() >= step * torch.finfo(kind).tiny  # where the format has all its digits, in a shard too
        assert exact.float().mean() > 0.99 and cast.float().abs().max() <= torch.finfo(kind).max
        everything = slice(None)
        for part in (slice(32), everything), (slice(32, 64), everything), (everything, slice(48, 96)), (slice(5, 6), everything):
            scale = scale_of(whole[part], kind)
            own = scale.cast(whole[part].t())  # of a column-major matrix
            assert own.is_contiguous()
            same = own.float().t() * scale.step == rounded[part]
            assert same[exact[part]].all()


def test_a_shard_is_rounded_as_the_whole():
    run_ranks(parts, 1)


def edges():
    values, gradients = torch.randn(7, 48), torch.randn(32, 7)  # 7 tokens: no multiple of what is read at once
    padded = of_weight(gradients, values)
    again = of_weight(torch.cat([gradients, torch.zeros(32, 9)], 1), torch.cat([values, torch.zeros(9, 48)]))
    assert torch.equal(padded, again) and padded.shape == (32, 48)
    assert of_weight(torch.zeros(32, 7), values).abs().max() == 0
    for bad in (float("nan"), float("inf"), float("-inf")):
        spoilt = values.clone()
        spoilt[3, 5] = bad
        assert forward(spoilt, torch.ones(16, 48)).isnan().all()
        assert of_weight(gradients, spoilt).isnan().all()


def test_ragged_tokens_zeros_and_what_is_not_finite():
    run_ranks(edges, 1)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_any_magnitude(magnitude):
    assert run_ranks(relative_error, 1, magnitude)[0] < 0.06


def relative_error(magnitude):
    x, weight = magnitude * torch.randn(32, 48), torch.randn(16, 48)
    exact = x.double() @ weight.double().t()
    return ((forward(x, weight).double() - exact).norm() / exact.norm()).item()
