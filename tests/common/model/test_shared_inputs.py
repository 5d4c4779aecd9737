"""Weight gradients that linears leave to their common input's turn are autograd's, to the last bit."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from recipes.common.model.linears import defer_weight_gradients, route_products
from recipes.common.model.shared_inputs import SharedInput
from recipes.common.model.weight_grad_store import WeightGradStore
from tests.support.inputs_turn import InputsTurn
from tools.common.forked_ranks import run_ranks


def gradients(dtype, kind, *, leaves):
    """Gradients of linears that read one tensor whole, twice, as rows, in part, not at all, and of a frozen one; and how many of
    their weights' gradients have waited for the input's turn."""
    torch.manual_seed(0)
    make = {"linear": lambda: nn.Linear(5, 4), "Conv1D": lambda: Conv1D(4, 5)}[kind]
    block = nn.ModuleList([make() for _ in range(6)]).to(dtype)
    whole, twice, rows, part, _, frozen = block
    frozen.weight.requires_grad_(False)
    route_products(block)
    store, waiting = WeightGradStore(), []
    if leaves == "deferred":
        defer_weight_gradients(block, store)
        store.begin()
    x = torch.randn(2, 3, 5).to(dtype).requires_grad_()
    read = x
    if leaves != "none":
        shared = SharedInput(list(block))
        reads = shared.reads()
        read = InputsTurn.apply(x * 1, reads, waiting, *reads.weights)
        shared.become(read, reads)
    total = whole(read) + twice(read) + twice(read) + rows(read.view(6, 5)).view(2, 3, 4) + frozen(read)
    (total.square().sum() + part(read[:, :2]).square().sum()).backward()
    if leaves == "deferred":
        store.compute_oldest()
    return [x.grad, *(p.grad for p in block.parameters())], waiting


def compared(dtype, kind):
    wanted, _ = gradients(dtype, kind, leaves="none")
    found = []
    for leaves in ("left", "deferred"):
        given, waiting = gradients(dtype, kind, leaves=leaves)
        same = [a is b is None or a.equal(b) for a, b in zip(wanted, given, strict=True)]
        found.append((same, waiting))
    return found


@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
def test_gradients_are_the_same(kind):
    for dtype in (torch.float32, torch.bfloat16):
        for same, waiting in run_ranks(compared, 1, dtype, kind)[0]:
            assert all(same) and waiting == [4]  # whole, twice and rows: a part of the tensor is another input


def forgotten():
    linear = nn.Linear(5, 4)
    route_products(linear)
    shared, x = SharedInput([linear]), torch.randn(3, 5, requires_grad=True)
    shared.become(x, shared.reads())
    shared.forget()
    linear(x).sum().backward()
    return linear.weight.grad is not None


def test_without_an_input_the_gradient_is_autograds():
    assert run_ranks(forgotten, 1) == [True]
