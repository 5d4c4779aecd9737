"""Adds up the gradients of a tensor that several linears read inside their products: queries, keys and values; gate and up.

Autograd would write each product's result and add them in kernels of their own, three times the tensor's bytes for every linear
but the first: more than half of what a layer of Llama 70B over eight tensor ranks moved beside products and attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class InputGradient:
    """The sum of the gradients that a tensor's readers have given so far."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None

    def add(self, grads: torch.Tensor, matrix: torch.Tensor, product: Callable[..., torch.Tensor]) -> None:
        """Add grads [n, out] @ matrix [out, in]. torch's own product adds it to the sum itself, which is then rounded once."""
        if self._sum is None:
            self._sum = product(grads, matrix)
        elif product is torch.mm:
            torch.addmm(self._sum, grads, matrix, out=self._sum)
        else:
            self._sum.add_(product(grads, matrix))

    def take(self) -> torch.Tensor | None:
        """Return the sum [n, in], None if nobody has given any, and forget it."""
        taken, self._sum = self._sum, None
        return taken


class _Shared(torch.autograd.Function):
    """Stands before the readers of a tensor. They return nothing; autograd runs its backward pass when all of theirs are done."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, gradient: InputGradient) -> torch.Tensor:
        ctx.gradient, ctx.shape = gradient, x.shape
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor | None):
        assert grad is None, "a reader that does not add to the sum"
        total = ctx.gradient.take()
        return (None if total is None else total.view(ctx.shape)), None


Enter = Callable[[torch.Tensor], tuple[torch.Tensor, InputGradient]]


def entrance(parent: nn.Module) -> Enter:
    """Return what gives the readers of one tensor in `parent` what they read in its place, and the gradient to add theirs to.

    Invariant: during one call of `parent`, `last` holds at most one input, what stands for it, and its gradient. An input is the
    same if it is the same object, and one that `last` holds cannot be freed. Between calls `last` is empty, so that it keeps no
    memory: also after a call that recomputation stops half-way by an exception.
    """
    last: list[tuple[torch.Tensor, torch.Tensor, InputGradient]] = []
    inner = parent.forward

    def enter(x: torch.Tensor) -> tuple[torch.Tensor, InputGradient]:
        if not last or last[0][0] is not x:
            gradient = InputGradient()
            last[:] = [(x, _Shared.apply(x, gradient), gradient)]
        return last[0][1:]

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return inner(*args, **kwargs)
        finally:
            last.clear()

    parent.forward = run
    return enter
