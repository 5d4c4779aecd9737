"""Gradients of a weight's parts are added up in fp32, whatever the precision of their factors, and forgotten once taken."""

import torch
from torch import nn

from recipes.common.model.gradient_sums import GradientSums
from recipes.common.model.linears import defer_weight_gradients, route_products
from tools.common.forked_ranks import run_ranks


def sums_of_a_bf16_linear():
    torch.manual_seed(0)
    linear, sums = nn.Linear(6, 5, dtype=torch.bfloat16), GradientSums()
    route_products(linear)
    defer_weight_gradients(linear, sums)
    parts = [(torch.randn(7, 6).bfloat16().requires_grad_(), torch.randn(7, 5).bfloat16()) for _ in range(9)]
    for x, grad in parts:
        _, bias = torch.autograd.grad(linear(x), [x, linear.bias], grad)
        sums.add(linear.bias, bias)
        assert linear.weight.grad is None
    weight, bias, nothing = sums.take([linear.weight, linear.bias, nn.Parameter(torch.zeros(1))])
    wanted = sum((grad.t() @ x).float() for x, grad in parts), sum(grad.sum(0).float() for _, grad in parts)
    assert weight.dtype == bias.dtype == torch.float32 and nothing is None
    assert sums.take([linear.weight]) == [None]
    return weight.equal(wanted[0].detach()), bias.equal(wanted[1])


def test_sums_are_fp32():
    assert run_ranks(sums_of_a_bf16_linear, 1) == [(True, True)]
