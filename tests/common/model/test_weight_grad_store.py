"""Deferred weight gradients are those of a plain backward pass, to the last bit."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from recipes.common.model.linears import defer_weight_gradients, route_products
from recipes.common.model.weight_grad_store import WeightGradStore
from tools.common.forked_ranks import run_ranks


def gradients_of_a_linear_used_twice():
    """A norm-like bias, a transposed weight, a frozen one, and a shared weight."""
    torch.manual_seed(0)
    first, second, frozen = nn.Linear(5, 5), Conv1D(5, 5), nn.Linear(5, 5)
    frozen.weight.requires_grad_(False)
    block = nn.ModuleList([first, second, frozen])
    store = WeightGradStore()

    def gradients():
        x = torch.arange(30.0).view(2, 3, 5).requires_grad_()
        store.begin()
        first(frozen(second(first(x)))).square().sum().backward()
        deferred = [first.weight.grad is None, second.weight.grad is None]
        store.compute_oldest()
        grads = [x.grad, *(p.grad for p in block.parameters() if p.requires_grad)]
        block.zero_grad()
        return grads, deferred

    route_products(block)
    plain, _ = gradients()
    defer_weight_gradients(block, store)
    late, deferred = gradients()
    return deferred, len(store), [a.equal(b) for a, b in zip(plain, late, strict=True)]


def test_deferred_weight_gradients_are_the_same():
    deferred, left, equal = run_ranks(gradients_of_a_linear_used_twice, 1)[0]
    assert (deferred, left, equal) == ([True, True], 0, [True] * 6)
