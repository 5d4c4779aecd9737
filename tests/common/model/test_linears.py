"""Our linears give what torch's give, forward and backward, whoever computes their products."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from recipes.common.model import linears
from recipes.common.model.linears import linear, plain_linears, product, route_products
from tools.common.forked_ranks import run_ranks

KINDS = {
    "linear": lambda: nn.Linear(24, 40),
    "without bias": lambda: nn.Linear(24, 40, bias=False),
    "Conv1D": lambda: Conv1D(40, 24),
}


def gradients(kind, dtype, taken, by_onednn):
    linears.onednn_is_faster = lambda: by_onednn
    torch.manual_seed(0)
    module = KINDS[kind]().to(dtype)
    if taken:
        route_products(module)
    x = torch.randn(3, 5, 24, dtype=dtype, requires_grad=True)
    module(x).square().sum().backward()
    return [module(x), x.grad, *(p.grad for p in module.parameters())]


def largest_difference(kind, dtype, by_onednn):
    pairs = zip(*(gradients(kind, dtype, taken, by_onednn) for taken in (False, True)), strict=True)
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_torchs(kind, dtype):
    bound = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}[dtype]
    assert run_ranks(largest_difference, 1, kind, dtype, True)[0] <= bound


@pytest.mark.parametrize("kind", KINDS)
def test_where_onednn_is_no_faster_products_are_torchs_to_the_last_bit(kind):
    assert run_ranks(largest_difference, 1, kind, torch.float32, False) == [0.0]


def edge_cases():
    linears.onednn_is_faster = lambda: True
    module = nn.Linear(8, 6)
    route_products(module)
    frozen = nn.Linear(8, 6).requires_grad_(False)
    route_products(frozen)
    x = torch.randn(4, 8, requires_grad=True)
    frozen(x).sum().backward()
    left, right = torch.randn(5, 7).t(), torch.randn(9, 5).t()  # strided
    empty = torch.empty(0, 8, requires_grad=True)  # an expert that no token visits
    module(empty).sum().backward()
    none = module.weight.grad.abs().sum().item() == 0 and list(empty.grad.shape) == [0, 8]
    module.zero_grad()
    linear(module, x.detach(), with_bias=False).sum().backward()
    return (
        none,
        torch.allclose(x.grad, frozen.weight.sum(0).expand(4, 8), atol=1e-6),
        frozen.weight.grad is None,
        module.bias.grad is None and module.weight.grad is not None,
        torch.allclose(product(left, right), left @ right, atol=1e-6),
    )


def test_no_rows_frozen_weights_and_strides():
    assert run_ranks(edge_cases, 1)[0] == (True, True, True, True, True)


class Own(nn.Linear):
    pass


def test_subclasses_keep_their_forward():
    with torch.device("meta"):
        block = nn.ModuleList([nn.Linear(2, 2), Own(2, 2), Conv1D(2, 2)])
    assert plain_linears(block) == [block[0], block[2]]
