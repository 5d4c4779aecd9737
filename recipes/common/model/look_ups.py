"""Looks up embeddings, and adds the gradients of what was read to the weight's fp32 sum, row by row.

Autograd would write a gradient of the whole table, most of it zeros, and have it added: for a vocabulary of 128,000 several times
what the tokens of a micro batch need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from recipes.common.model.main_grads import MainGrad, main_grad_of


class _LookUp(torch.autograd.Function):
    """The weight is an input so that the backward pass visits it without a gradient, and its hooks know: see `linears`."""

    @staticmethod
    def forward(ctx, ids: torch.Tensor, weight: nn.Parameter, padding_idx: int | None, main_grad: MainGrad) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.padding_idx, ctx.main_grad = padding_idx, main_grad
        return F.embedding(ids, weight.detach())

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        ids = ctx.saved_tensors[0].flatten()
        rows = grad.reshape(len(ids), -1)
        if ctx.padding_idx is not None:
            rows = rows.masked_fill((ids == ctx.padding_idx).unsqueeze(1), 0.0)
        ctx.main_grad.add_rows(ids, rows)
        return None, None, None, None


def look_up(
    ids: torch.Tensor,
    weight: torch.Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> torch.Tensor:
    """Do the same as `torch.nn.functional.embedding`, whose gradient goes to the weight's sum where it has one."""
    main_grad = main_grad_of(weight)
    if main_grad is None or not torch.is_grad_enabled() or max_norm is not None or scale_grad_by_freq or sparse:
        return F.embedding(ids, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    return _LookUp.apply(ids, weight, padding_idx, main_grad)


class _Exchanged(TorchFunctionMode):
    """Computes look-ups by `look_up`."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        return (look_up if func is F.embedding else func)(*args, **(kwargs or {}))


def add_rows_read(module: nn.Embedding) -> None:
    """Let a table that one rank has whole add its gradient by rows. What a subclass does with what is found is kept."""
    forward = module.forward

    def run(ids: torch.Tensor) -> torch.Tensor:
        with _Exchanged():
            return forward(ids)

    module.forward = run
