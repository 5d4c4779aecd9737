"""Gives linears their common input's turn in the backward pass, on one rank."""

import torch


class InputsTurn(torch.autograd.Function):
    """Stands before linears that share an input, as the collectives of tensor ranks do, and exchanges nothing."""

    @staticmethod
    def forward(ctx, x, reads, waiting, *weights):
        ctx.save_for_backward(x)
        ctx.reads, ctx.waiting = reads, waiting
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.waiting.append(len(ctx.reads))
        rows = ctx.saved_tensors[0].view(-1, 5)
        if ctx.reads.store is None:
            return grad, None, None, *ctx.reads.compute(rows)
        ctx.reads.defer(rows)
        return grad, None, None
