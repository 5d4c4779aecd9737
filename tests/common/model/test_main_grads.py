"""A weight's sum gets what autograd would give it, and the weight's hooks run once a pass, when all of it is there."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from recipes.common.model.linears import defer_weight_gradients, route_products
from recipes.common.model.main_grads import add_product, give_main_grad, main_grad_of
from recipes.common.model.shared_inputs import SharedInput
from recipes.common.model.weight_grad_store import WeightGradStore
from tests.support.inputs_turn import InputsTurn
from tools.common.forked_ranks import run_ranks


def sums_of(dtype, *, way):
    """Two micro batches through a linear run twice, a transposed one, one that the loss multiplies by too, and one not run.

    Returns the sums, and for each hook of a weight whether its `grad` was there and which parts of its sum were.
    """
    torch.manual_seed(0)
    twice, turned, mixed, idle = block = nn.ModuleList([nn.Linear(5, 5), Conv1D(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)]).to(
        dtype
    )
    route_products(block, by_torch=True)
    sums, hooks, adding, begun = {}, [], [], set()

    def begins(name):
        first = name not in begun
        begun.add(name)
        return first

    for name, parameter in block.named_parameters():
        last_steps = 0.0 if name.startswith("3.") else torch.nan
        sums[name] = torch.full_like(parameter, last_steps, dtype=torch.float32)
        if way != "autograd":
            give_main_grad(parameter, sums[name], lambda name=name: adding.append(name) or begins(name))

        def hook(parameter, name=name):
            hooks.append((name, parameter.grad is not None, bool(sums[name].any())))
            if parameter.grad is not None:
                (sums[name].copy_ if begins(name) else sums[name].add_)(parameter.grad)
                parameter.grad = None

        parameter.register_post_accumulate_grad_hook(hook)
    store = WeightGradStore()
    if way == "deferred":
        defer_weight_gradients(block, store)
    for scale in (1.0, 2.0):
        store.begin()
        x = torch.arange(30.0).view(2, 3, 5).to(dtype).mul(scale / 30).requires_grad_()
        if way == "shared":
            shared = SharedInput([twice, turned])
            reads = shared.reads()
            x = InputsTurn.apply(x, reads, [], *reads.weights)
            shared.become(x, reads)
        y = mixed(twice(x) + twice(x) + turned(x))
        (y.square().sum() + mixed.weight.square().sum()).backward()
        store.compute_oldest()
    assert (idle.weight.grad is None and main_grad_of(idle.weight) is None) or not main_grad_of(idle.weight).reached
    return sums, hooks, adding


def compared(dtype):
    wanted, _, _ = sums_of(dtype, way="autograd")
    return {way: (wanted, *sums_of(dtype, way=way)) for way in ("sums", "shared", "deferred")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_autograds(dtype):
    for way, (wanted, found, hooks, adding) in run_ranks(compared, 1, dtype)[0].items():
        for name, total in found.items():
            bound = 1e-6 if dtype == torch.float32 else 2e-2  # autograd rounds the sum of a linear run twice to 16 bits
            assert torch.allclose(total, wanted[name], rtol=bound, atol=bound * wanted[name].abs().max().item()), (way, name)
        assert adding.count("0.weight") == 4 and adding.count("1.weight") == 2, way  # each call of each micro batch
        assert "3.weight" not in adding
        visited = [(name, with_grad) for name, with_grad, _ in hooks if name in ("0.weight", "1.weight")]
        assert visited == [] if way == "deferred" else sorted(visited) == [(f"{i}.weight", False) for i in (0, 0, 1, 1)], way
        assert all(there for name, with_grad, there in hooks if not with_grad), way


def a_hook_that_would_see_nothing():
    weight = nn.Parameter(torch.zeros(2))
    weight.register_hook(lambda grad: 2 * grad)
    give_main_grad(weight, torch.zeros(2), lambda: False)


def test_a_weight_whose_gradient_a_hook_changes_has_no_sum():
    with pytest.raises(AssertionError, match="would not see the gradient"):
        a_hook_that_would_see_nothing()


def products_of_16_bits():
    """On a GPU the product itself writes fp32, and no tensor of 16 bits comes between: told by the operator and its result."""
    left, right = torch.randn(6, 9).bfloat16(), torch.randn(9, 4).bfloat16()
    total = torch.ones(6, 4)
    add_product(total, left, right, torch.mm)
    rounded = (left @ right).float() + 1.0
    exact = torch.ones(6, 4)
    add_product(exact, left.float(), right.float(), torch.mm)
    others = torch.ones(6, 4)
    add_product(others, left, right, lambda a, b: 2 * torch.mm(a, b))  # another library's, or fp8's
    return (
        total.equal(rounded),
        torch.allclose(exact, left.float() @ right.float() + 1.0, atol=1e-5),
        others.equal(2 * (left @ right).float() + 1.0),
    )


def test_a_product_is_added():
    assert run_ranks(products_of_16_bits, 1) == [(True, True, True)]
