"""Linears that read one tensor add up its gradient, whatever else they read and whether all of them are used."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from recipes.common.model.input_gradients import InputGradient
from recipes.common.model.linears import route_products, sum_input_gradients
from tools.common.forked_ranks import run_ranks


class _Block(nn.Module):
    """Reads its input by three linears and a factor, what two of them give by a fourth, and leaves out what one gives."""

    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "up_proj", "o_proj"):
            setattr(self, name, nn.Linear(6, 6, bias=name == "k_proj"))

    def forward(self, x):
        self.up_proj(x)
        return self.o_proj(self.q_proj(x).sin() * self.k_proj(x).cos()) + self.v_proj(x + 0.0) * x


def _gradients(dtype, *, by_torch, shared, again):
    torch.manual_seed(3)
    block, x = _Block().to(dtype), torch.randn(2, 5, 6, dtype=dtype, requires_grad=True)
    route_products(block, by_torch=by_torch)
    if shared:
        sum_input_gradients(block)
    out = checkpoint(block, x, use_reentrant=False) if again else block(x)
    out.float().square().sum().backward()
    with torch.no_grad():
        block(x)  # what has no gradient shares none
    return [x.grad, *(p.grad for p in block.parameters())]


def _worst(dtype, by_torch, again):
    wanted = _gradients(dtype, by_torch=True, shared=False, again=False)
    found = _gradients(dtype, by_torch=by_torch, shared=True, again=again)
    pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if b is not None]
    assert len(pairs) == 6
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


@pytest.mark.parametrize(("by_torch", "again"), [(False, False), (False, True), (True, True)])
def test_the_sum_is_autograds(by_torch, again):
    assert run_ranks(_worst, 1, torch.float32, by_torch, again)[0] <= 1e-6


def test_in_16_bits_a_product_adds_to_the_sum():
    assert run_ranks(_worst, 1, torch.bfloat16, True, False)[0] <= 2e-2


class _Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen.append(op._schema.name)
        return op(*args, **(kwargs or {}))


def _products():
    with _Names() as names:
        _gradients(torch.bfloat16, by_torch=True, shared=True, again=False)
    return names.seen.count("aten::addmm")


def test_one_product_adds_to_the_others():
    """Of q_proj and k_proj; up_proj has no gradient. The biased one is an addmm in the forward pass, too, of both calls."""
    assert run_ranks(_products, 1)[0] == 3


def _runs_again(shared):
    """Return how often the last linear of a recomputed block computes its product."""
    block = _Block()
    block.forward = lambda x: block.o_proj(block.q_proj(x) * block.k_proj(x))
    route_products(block, by_torch=True)
    if shared:
        sum_input_gradients(block)
    with _Names() as names:
        checkpoint(block, torch.randn(2, 5, 6, requires_grad=True), use_reentrant=False).sum().backward()
    return sum(name in ("aten::mm", "aten::addmm") for name in names.seen)


def test_a_block_that_runs_again_stops_before_its_last_product():
    """Three products three times, and two of them again."""
    assert [run_ranks(_runs_again, 1, shared)[0] for shared in (False, True)] == [11, 11]


def sums_of_two_products():
    grads, matrix = torch.randn(6, 5), torch.randn(5, 4)
    found = []
    for product in (torch.mm, lambda a, b: torch.mm(a, b)):  # torch's own, and another library's
        gradient = InputGradient()
        for scale in (1.0, 2.0):
            gradient.add(scale * grads, matrix, product)
        found.append(torch.allclose(gradient.take(), 3.0 * grads @ matrix, atol=1e-5) and gradient.take() is None)
    return found


def test_each_product_is_added_by_whatever_library():
    assert run_ranks(sums_of_two_products, 1) == [[True, True]]
