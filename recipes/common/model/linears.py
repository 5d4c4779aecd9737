"""Plain linears: which product computes them, and when the weight's gradient is computed.

On CPUs fp32 products go through oneDNN, the library that torch itself takes for bf16: torch's own fp32 linear calls MKL, which on
an AMD EPYC was 2.2 times slower (112 against 250 GFLOP/s a core; `tools.throughput bench` shows steps with both). On GPUs, and in
every other precision, a product is torch's own.

The weight's gradient may wait (`weight_queue`). The products are the same, in autograd's order, so that it is equal to the
last bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

Linear = nn.Linear | Conv1D


def plain_linears(module: nn.Module) -> list[Linear]:
    """Those in `module` whose forward pass is the product alone: no subclasses."""
    return [inner for inner in module.modules() if type(inner) in (nn.Linear, Conv1D)]


def route_products(module: nn.Module, *, by_torch: bool = False) -> None:
    """Let the plain linears in `module` compute by `linear`. Before the tensor-parallel substitution, which wraps forwards.

    by_torch: with torch's own products, on CPUs too.
    """
    for inner in plain_linears(module):
        inner.forward, inner.by_torch = partial(linear, inner), by_torch


def defer_weight_gradients(module: nn.Module, queue: WeightGradStore) -> None:
    """Let the weight gradients of the plain linears in `module`, which are taken over, go through `queue`."""
    for inner in plain_linears(module):
        inner.weight_queue = queue


def postponable_share(module: nn.Module) -> float:
    """How much of `module`'s parameters `defer_weight_gradients` reaches: what it cannot reach fills no bubble."""
    return sum(inner.weight.numel() for inner in plain_linears(module)) / sum(p.numel() for p in module.parameters())


def linear(module: Linear, x: torch.Tensor, *, with_bias: bool = True) -> torch.Tensor:
    """What the linear gives for x [..., in], or its product alone. The weight's gradient waits if the module has a queue."""
    bias = module.bias if with_bias else None
    onednn = _by_onednn(x) and not getattr(module, "by_torch", False)
    if torch.is_grad_enabled():
        queue = getattr(module, "weight_queue", None)
        if queue is not None and module.weight.requires_grad and x.requires_grad:
            return _Postponed.apply(x, bias, module, queue, onednn)
        if onednn:
            return _Linear.apply(x, _matrix(module), bias)
    return _forward(x, _matrix(module), bias, onednn)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right of two matrices, by oneDNN, which takes no empty ones."""
    if not left.numel() or not right.numel():
        return left @ right
    return torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")


def _by_onednn(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def _matrix(module: Linear) -> torch.Tensor:
    """[out, in]; Conv1D keeps it the other way round."""
    return module.weight.t() if isinstance(module, Conv1D) else module.weight


def _forward(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, onednn: bool) -> torch.Tensor:
    if onednn and x.numel():
        return torch.ops.mkldnn._linear_pointwise(x, matrix, bias, "none", [], "")
    return F.linear(x, matrix, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, matrix)
        return _forward(x, matrix, bias, True)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        x, matrix = ctx.saved_tensors
        rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        wanted = ctx.needs_input_grad
        return (
            product(grads, matrix).view(x.shape) if wanted[0] else None,
            product(grads.t(), rows) if wanted[1] else None,
            grads.sum(0) if wanted[2] else None,
        )


class _Postponed(torch.autograd.Function):
    """The weight comes with its module: as an input it would be visited by the backward pass, with no gradient, and its hooks
    would run; saved with x, recomputation would give back a copy, whose gradient may never reach the weight."""

    @staticmethod
    def forward(
        ctx, x: torch.Tensor, bias: nn.Parameter | None, module: Linear, queue: WeightGradStore, onednn: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.module, ctx.queue, ctx.product = module, queue, product if onednn else torch.mm
        return _forward(x, _matrix(module), bias, onednn)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        x, module = ctx.saved_tensors[0], ctx.module
        rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        factors = (rows.t(), grads) if isinstance(module, Conv1D) else (grads.t(), rows)
        ctx.queue.put(module.weight, *factors, ctx.product)
        grad_bias = grads.sum(0) if ctx.needs_input_grad[1] else None
        return ctx.product(grads, _matrix(module)).view(x.shape), grad_bias, None, None, None


Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class WeightGradStore:
    """The weight gradients that wait, each as its two factors, by micro batch in the order of the backward passes."""

    def __init__(self) -> None:
        self._waiting: deque[dict[nn.Parameter, list[tuple[torch.Tensor, torch.Tensor, Product]]]] = deque()

    def __len__(self) -> int:
        """How many micro batches wait."""
        return len(self._waiting)

    def begin(self) -> None:
        """The backward pass of the next micro batch follows."""
        self._waiting.append({})

    def put(self, weight: nn.Parameter, left: torch.Tensor, right: torch.Tensor, product: Product) -> None:
        """The gradient of `weight` is product(left, right)."""
        assert self._waiting, "a backward pass that no schedule began: its weight gradients would be lost"
        self._waiting[-1].setdefault(weight, []).append((left, right, product))

    def compute_oldest(self) -> None:
        """Compute and accumulate the weight gradients of the micro batch that has waited longest.

        Each goes to its weight through autograd, so that hooks run (tensor ranks sum, DeepSpeed adds up in fp32), and is let
        go before the next one is computed.
        """
        waiting = self._waiting.popleft()
        while waiting:
            weight, factors = waiting.popitem()
            gradient = None
            while factors:  # several where the model uses a weight twice; autograd, too, sums them before it accumulates
                left, right, product = factors.pop(0)
                part = product(left, right)
                gradient = part if gradient is None else gradient + part
            torch.autograd.backward([weight], [gradient])
