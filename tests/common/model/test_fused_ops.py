"""Compiled operators compute what their functions compute, gradients too, by the compiler that this machine has."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from recipes.common.model.fused_ops import Fusable, compiled_operator, compiled_update, fused, fused_beside
from tools.common.forked_ranks import run_ranks


def _gated(gate, up, scale):
    return F.silu(gate.float()).to(gate.dtype) * up * scale


def _differences():
    torch.manual_seed(0)
    inputs = [torch.randn(*shape, requires_grad=True) for shape in ((2, 5, 8), (2, 5, 8), (8,))]
    grad = torch.randn(2, 5, 8)
    found, wanted = fused(Fusable("gated", "a test's", 3, _gated))(*inputs), _gated(*inputs)
    pairs = zip(
        (found, *torch.autograd.grad(found, inputs, grad)), (wanted, *torch.autograd.grad(wanted, inputs, grad)), strict=True
    )
    return [(a - b).abs().max().item() for a, b in pairs], type(found.grad_fn).__name__


def _of_any_rows():
    """Return what differs for ten numbers of rows, none and one among them."""
    run, worst = fused(Fusable("squared", "a test's", 1, lambda x: x.square() * 2, rows_vary=True)), 0.0
    for rows in (3, 5, 0, 1, 7, 9, 11, 13, 15, 17):
        x = torch.randn(rows, 8, requires_grad=True)
        (grad,) = torch.autograd.grad(run(x).sum(), x)
        worst = max([worst, *(grad - 4 * x).abs().flatten().tolist()])
    return worst


def _of_one_code():
    """Return what differs of two operators, gradients too, whose functions one line made, where torch compiles it once."""
    worst = 0.0
    with torch._dynamo.config.patch(recompile_limit=1):
        for factor in (2.0, 3.0):
            x = torch.randn(4, 8, requires_grad=True)
            run = fused(Fusable("scaled", f"a test's {factor}", 1, lambda x, factor=factor: x.square() * factor))
            (grad,) = torch.autograd.grad(run(x).sum(), x)
            worst = max(worst, (grad - 2 * factor * x).abs().max().item())
    return worst


def _compiled():
    """In one process, for what torch does before its first kernel takes longer than all of these."""
    config = torch._inductor.config
    config.compile_threads = 1  # no pool of processes for five kernels
    config.cpp.vec_isa_ok = False  # torch would compile a program for each instruction set that the CPU may have
    return _differences(), _of_any_rows(), _of_one_code()


@pytest.fixture(scope="module")
def compiled():
    if shutil.which("g++") is None:
        pytest.skip("nothing compiles C++ here")
    return run_ranks(_compiled, 1, timeout_seconds=1200)[0]


def test_a_compiled_function_and_its_gradients(compiled):
    differences, node = compiled[0]
    assert max(differences) <= 2e-6 and node == "_FusedBackward"


def test_rows_may_vary_more_often_than_torch_compiles_for_sizes(compiled):
    """It gives up after eight."""
    assert compiled[1] <= 1e-6


def test_each_operator_is_compiled_on_its_own_account(compiled):
    """A model has more kinds of gradients than torch compiles of one code."""
    assert compiled[2] <= 1e-5


def _shapes_without_memory():
    double = compiled_operator("a_test_doubles", "", lambda x: (2 * x, x.sum(0)), lambda x: (torch.empty_like(x), x[0]))
    update = compiled_update("a_test_overwrites", lambda x, y: x * y)
    with FakeTensorMode():
        x = torch.empty(3, 4)
        return [tuple(each.shape) for each in double([x])], update(x, [torch.empty(3, 1)]) is x


def test_operators_run_without_memory_as_planning_and_rehearsing_need():
    assert run_ranks(_shapes_without_memory, 1)[0] == ([(3, 4), (4,)], True)


def _scaled(hidden, weight):
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-3) * weight


def _beside(source):
    """Return what differs where the norm's input is used before the norm and after it, and what its node is."""
    results = []
    for run in (_scaled, fused_beside(Fusable("scaled", "a test's", 2, _scaled))):
        torch.manual_seed(1)
        leaf, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4, 8), (8,)))
        hidden = {"result": leaf * 2, "leaf": leaf, "view": (leaf * 2).flatten(1).view(3, 4, 8)}[source]
        before, version = hidden.sin() * hidden, hidden._version  # saves it
        result = run(hidden, weight)
        out = hidden + result.tanh()
        (out.square() * before).sum().backward()
        assert hidden._version == version
        results.append([out.detach(), leaf.grad, weight.grad])
        node = type(hidden.grad_fn).__name__
    return max((a - b).abs().max().item() for a, b in zip(*results, strict=True)), node


@pytest.mark.parametrize(
    ("source", "node"), [("result", "_FusedBesideBackward"), ("leaf", "NoneType"), ("view", "ViewBackward0")]
)
def test_other_gradients_of_its_input_are_added_in_the_same_operator(source, node, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    difference, found = run_ranks(_beside, 1, source)[0]
    assert difference <= 1e-10 and found == node


def _unused_and_alone():
    """Return gradients where nobody uses the result, and where nobody else uses its input."""
    run, weight = fused_beside(Fusable("scaled", "another test's", 2, _scaled)), torch.ones(8, requires_grad=True)
    leaf = torch.randn(3, 8, requires_grad=True)
    hidden = leaf * 1.0
    run(hidden, weight)
    (unused,) = torch.autograd.grad(hidden.sum(), leaf)
    (alone,) = torch.autograd.grad(run(leaf * 1.0, weight).square().sum(), leaf)
    (wanted,) = torch.autograd.grad(_scaled(leaf * 1.0, weight).square().sum(), leaf)
    return unused.equal(torch.ones(3, 8)), alone.allclose(wanted, atol=1e-6)


def test_a_result_or_an_input_that_is_not_used_besides(monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert run_ranks(_unused_and_alone, 1)[0] == (True, True)
