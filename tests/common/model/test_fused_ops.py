"""Compiled operators compute what their functions compute, gradients too, by the compiler that this machine has."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from recipes.common.model.fused_ops import Fusable, compiled_operator, compiled_update, fused
from tools.common.forked_ranks import run_ranks


def _gated(gate, up, scale):
    return F.silu(gate.float()).to(gate.dtype) * up * scale


def _differences():
    torch.manual_seed(0)
    torch._inductor.config.compile_threads = 1  # no pool of processes for three kernels
    inputs = [torch.randn(*shape, requires_grad=True) for shape in ((2, 5, 8), (2, 5, 8), (8,))]
    grad = torch.randn(2, 5, 8)
    found, wanted = fused(Fusable("gated", "a test's", 3, _gated))(*inputs), _gated(*inputs)
    pairs = zip(
        (found, *torch.autograd.grad(found, inputs, grad)), (wanted, *torch.autograd.grad(wanted, inputs, grad)), strict=True
    )
    return [(a - b).abs().max().item() for a, b in pairs], type(found.grad_fn).__name__


@pytest.mark.skipif(shutil.which("g++") is None, reason="nothing compiles C++ here")
def test_a_compiled_function_and_its_gradients():
    differences, node = run_ranks(_differences, 1, timeout_seconds=1200)[0]
    assert max(differences) <= 2e-6 and node == "_FusedBackward"


def _shapes_without_memory():
    double = compiled_operator("a_test_doubles", "", lambda x: (2 * x, x.sum(0)), lambda x: (torch.empty_like(x), x[0]))
    update = compiled_update("a_test_overwrites", lambda x, y: x * y)
    with FakeTensorMode():
        x = torch.empty(3, 4)
        return [tuple(each.shape) for each in double([x])], update(x, [torch.empty(3, 1)]) is x


def test_operators_run_without_memory_as_planning_and_rehearsing_need():
    assert run_ranks(_shapes_without_memory, 1)[0] == ([(3, 4), (4,)], True)
