"""Sums the gradient of an input that tensor ranks share while they compute the weight gradients of its linears.

Column-parallel linears (queries, keys and values; gate and up) read one input whole on every rank, so its gradient is a sum over
the ranks. Autograd would compute each linear's weight gradient first and then stand still for the sum. Here the linears leave
their weight gradients to the input (`model.shared_inputs`), which starts the sum, computes them, and only then waits (as
Megatron does for each linear by itself). Under sequence parallelism the input is gathered, and gathered a second time while
the gradients that its linears give it are computed.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from recipes.common.model.shared_inputs import Reads, SharedInput
from recipes.common.parallel.collectives import (
    all_gather_sequence,
    start_all_gather_sequence,
    start_all_reduce,
    start_reduce_scatter_sequence,
)
from recipes.common.parallel.kept_rows import KeptInput, KeptRows


class _Copy(torch.autograd.Function):
    """An input that every rank has whole."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, group: dist.ProcessGroup, reads: Reads, own: bool, *weights: nn.Parameter) -> torch.Tensor:
        ctx.group, ctx.reads, ctx.own = group, reads, own
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        total = start_all_reduce(grad, ctx.group, own=ctx.own)
        del grad
        (x,) = ctx.saved_tensors
        gradients = _weight_gradients(ctx.reads, x.reshape(-1, x.shape[-1]))
        return total.result(), None, None, None, *gradients


class _Gather(torch.autograd.Function):
    """An input of which every rank has a part of the sequence."""

    @staticmethod
    def forward(
        ctx, part: torch.Tensor, group: dist.ProcessGroup, reads: Reads, kept: KeptInput | None, *weights: nn.Parameter
    ) -> torch.Tensor:
        ctx.group, ctx.reads, ctx.kept = group, reads, kept
        whole = all_gather_sequence(part, group)
        if kept is None:
            ctx.save_for_backward(part if reads.store is not None else whole)
        return whole

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        total = start_reduce_scatter_sequence(grad, ctx.group)
        del grad
        reads, kept = ctx.reads, ctx.kept
        if reads.store is not None:  # the weights' gradients come much later: only this rank's part is kept for them
            part = ctx.saved_tensors[0].detach() if kept is None else kept.part
            gather = start_all_gather_sequence
            gradients = _weight_gradients(reads, KeptRows(part, ctx.group, gather=gather, uses=len(reads)))
        else:
            whole = ctx.saved_tensors[0] if kept is None else kept.whole()
            gradients = _weight_gradients(reads, whole.view(-1, whole.shape[-1]))
        if kept is not None:
            kept.drop()
        return total.result(), None, None, None, *gradients


def _weight_gradients(reads: Reads, rows: torch.Tensor | KeptRows) -> list[torch.Tensor | None]:
    if reads.store is None:
        return reads.compute(rows)
    reads.defer(rows)
    return []


def copy_shared(x: torch.Tensor, group: dist.ProcessGroup, shared: SharedInput, *, alone: bool) -> torch.Tensor:
    """Return `x`, whose gradient is summed over the group beside the weight gradients of the linears that share it.

    alone: no other module reads what is returned, so that its gradient is ours to overwrite.
    """
    reads = shared.reads()
    copy = _Copy.apply(x, group, reads, alone, *reads.weights)
    shared.become(copy, reads)
    return copy


def gather_shared(part: torch.Tensor, group: dist.ProcessGroup, shared: SharedInput, kept: KeptInput | None) -> torch.Tensor:
    """Concatenate the parts of the sequence; the gradient is reduce-scattered beside the linears' weight gradients.

    kept: what gathers it again in the backward pass, beside the linears' own gradients. None: it is saved whole.
    """
    reads = shared.reads(None if kept is None else kept.start)
    whole = _Gather.apply(part, group, reads, kept, *reads.weights)
    shared.become(whole, reads)
    return whole
