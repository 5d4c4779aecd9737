"""Linears whose backward pass computes the input's gradient now and leaves the weight's gradient for later.

A pipeline stage owes the stage before it the input's gradient alone; the other half of the work can wait for a moment in which
the stage would be idle (zero-bubble schedules, arXiv 2401.10241). Everything else keeps its ordinary backward pass: norms,
biases, embeddings, the head (its gradients are computed with the loss) and experts that are no linears.
The products are those that autograd computes, in autograd's order, so gradients are equal to the last bit.
"""

from __future__ import annotations

from collections import deque
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D


class WeightQueue:
    """The weight gradients that wait, each as its two factors, by micro batch in the order of the backward passes."""

    def __init__(self) -> None:
        self._waiting: deque[dict[nn.Parameter, list[tuple[torch.Tensor, torch.Tensor]]]] = deque()

    def __len__(self) -> int:
        """How many micro batches wait."""
        return len(self._waiting)

    def begin(self) -> None:
        """The backward pass of the next micro batch follows."""
        self._waiting.append({})

    def put_off(self, weight: nn.Parameter, left: torch.Tensor, right: torch.Tensor) -> None:
        """The gradient of `weight` is left.t() @ right, both [tokens, width]."""
        assert self._waiting, "a backward pass that no schedule began: its weight gradients would be lost"
        self._waiting[-1].setdefault(weight, []).append((left, right))

    def make_up(self) -> None:
        """Compute and accumulate the weight gradients of the micro batch that has waited longest.

        Each goes to its weight through autograd, so that hooks run (tensor ranks sum, DeepSpeed adds up in fp32), and is let
        go before the next one is computed.
        """
        waiting = self._waiting.popleft()
        while waiting:
            weight, factors = waiting.popitem()
            gradient = None
            while factors:  # several where the model uses a weight twice; autograd, too, sums them before it accumulates
                left, right = factors.pop(0)
                product = left.t() @ right
                gradient = product if gradient is None else gradient + product
            torch.autograd.backward([weight], [gradient])


def postpone_weight_gradients(module: nn.Module, queue: WeightQueue) -> None:
    """Let the weight gradients of every plain linear in `module` go through `queue`.

    To be done before the tensor-parallel substitution, which wraps forwards. Subclasses of linears stay as they are.
    """
    for inner in _plain_linears(module):
        inner.weight_queue = queue
        inner.forward = partial(linear, inner)


def postponable_share(module: nn.Module) -> float:
    """How much of `module`'s parameters `postpone_weight_gradients` reaches: what it cannot reach fills no bubble."""
    return sum(inner.weight.numel() for inner in _plain_linears(module)) / sum(p.numel() for p in module.parameters())


def _plain_linears(module: nn.Module) -> list[nn.Linear | Conv1D]:
    return [inner for inner in module.modules() if type(inner) in (nn.Linear, Conv1D)]


def linear(module: nn.Linear | Conv1D, x: torch.Tensor, *, with_bias: bool = True) -> torch.Tensor:
    """What the linear gives for x [..., in], or its product alone. The weight's gradient waits if the module has a queue."""
    weight, bias, queue = module.weight, module.bias if with_bias else None, getattr(module, "weight_queue", None)
    transposed = isinstance(module, Conv1D)  # its weight is [in, out]
    if queue is not None and torch.is_grad_enabled() and x.requires_grad and weight.requires_grad:
        return _Postponed.apply(x, weight, bias, transposed, queue)
    return F.linear(x, weight.t() if transposed else weight, bias)


class _Postponed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: torch.Tensor, weight: nn.Parameter, bias: nn.Parameter | None, transposed: bool, queue: WeightQueue
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        # not saved with x: recomputation would give back a copy, whose gradient may never reach the weight
        ctx.weight, ctx.transposed, ctx.queue = weight, transposed, queue
        return F.linear(x, weight.t() if transposed else weight, bias)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        x, weight = ctx.saved_tensors[0], ctx.weight
        shape = x.shape
        x, grad = x.reshape(-1, shape[-1]), grad.reshape(-1, grad.shape[-1])
        if ctx.transposed:
            ctx.queue.put_off(weight, x, grad)
            grad_x = grad @ weight.t()
        else:
            ctx.queue.put_off(weight, grad, x)
            grad_x = grad @ weight
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x.view(shape), None, grad_bias, None, None
