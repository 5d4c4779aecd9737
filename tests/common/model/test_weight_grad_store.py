"""Deferred weight gradients are those of a plain backward pass, to the last bit."""

from contextlib import nullcontext
from functools import partial

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from recipes.common.model.linears import defer_weight_gradients, route_products
from recipes.common.model.main_grads import give_main_grad
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


def gradients_of_three(way):
    """Gradients of three linears in a row over two micro batches, and in which order they were added and complete."""
    torch.manual_seed(0)
    block, store, events = nn.Sequential(*(nn.Linear(5, 5) for _ in range(3))), WeightGradStore(), []
    totals = [torch.zeros(5, 5) for _ in block]
    for index, (inner, total) in enumerate(zip(block, totals, strict=True)):
        adding, added = (partial(events.append, f"{what} {index}") for what in ("adds", "has"))
        give_main_grad(inner.weight, total, adding, added)
    route_products(block)
    defer_weight_gradients(block, store)
    for micro_batch in range(2):
        x = torch.randn(2, 3, 5, requires_grad=True)
        store.begin()
        with store.at_once(store.weights) if way == "at once" and micro_batch else nullcontext():
            block(x).square().sum().backward()
        events.append("passed")
        if way != "together":
            store.compute_oldest()
    if way == "together":
        store.compute_oldest(2)
    assert not len(store) and store.all_have_sums()
    return torch.stack(totals), events


def three_ways():
    (plain, _), (together, order), (at_once, beside) = map(gradients_of_three, ("each", "together", "at once"))
    return together.equal(plain), order, at_once.equal(plain), beside


def test_last_gradients_come_a_weight_at_a_time_to_the_same_bits():
    same, order, same_at_once, beside = run_ranks(three_ways, 1)[0]
    assert same and same_at_once
    each = [word for index in (2, 1, 0) for word in (f"adds {index}", f"has {index}")]
    assert order == ["passed"] * 2 + [word for index in (2, 1, 0) for word in [f"adds {index}"] * 2 + [f"has {index}"]]
    assert beside == ["passed", *each, *each[:4], "passed", *each[4:]]


def a_weight_used_twice_at_once():
    """What the micro batch before used twice is left to the end, or its first product would seem to be all."""
    torch.manual_seed(0)
    block, store, events = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)), WeightGradStore(), []
    first, second = block
    for inner in block:
        give_main_grad(inner.weight, torch.zeros(5, 5), lambda: False, partial(events.append, inner is first))
    route_products(block)
    defer_weight_gradients(block, store)
    for micro_batch in range(2):
        store.begin()
        with store.at_once(store.weights) if micro_batch else nullcontext():
            second(first(second(first(torch.randn(3, 5, requires_grad=True))))).sum().backward()
        events.append("passed")
        store.compute_oldest()
    return events


def test_a_weight_used_twice_is_complete_once():
    events = run_ranks(a_weight_used_twice_at_once, 1)[0]
    assert events == ["passed", False, True, "passed", False, True]
