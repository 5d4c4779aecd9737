"""Computes next-token cross-entropy on a vocabulary sharded over the tensor ranks, a chunk of tokens at a time.

Full logits never exist: a chunk's logits [tokens, vocabulary / tensor] live only while its loss and its gradient are computed,
both in the forward pass (the idea of Liger's fused linear cross-entropy, arXiv 2410.10989). The family's own code turns
hidden states into logits, so soft-caps and logit scales are kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from recipes.common.parallel.collectives import all_reduce

IGNORED = -100  # a target that is not scored, as in transformers

LogitsOf = Callable[[torch.Tensor], torch.Tensor]


def vocabulary_loss(
    logits_of: LogitsOf,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: list[torch.nn.Parameter],
    *,
    vocab_size: int,
    first_row: int,
    group: dist.ProcessGroup | None,
    chunk_tokens: int,
    z_loss: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (loss [], sums [3] of cross-entropy, log(Z)^2 and log(Z), largest logit []) over the scored tokens; fp32.

    logits_of: hidden [1, tokens, width] -> this rank's logits [1, tokens, rows]; uses the parameters in `head`.
    hidden: [micro_seqs, seq_len, width]; targets: [micro_seqs, seq_len], IGNORED where not scored.
    vocab_size: rows of the whole vocabulary; `first_row` is this rank's first one, rows past the end are padding.
    The first result is cross-entropy + z_loss * log(Z)^2; only it carries a gradient. The largest of no logits is -inf.
    """
    flat = hidden.reshape(1, -1, hidden.shape[-1])
    args = (logits_of, targets.reshape(-1), vocab_size, first_row, group, chunk_tokens, z_loss)
    return _VocabularyLoss.apply(flat, args, *head)


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: torch.Tensor, args: tuple, *head: torch.nn.Parameter):
        logits_of, targets, vocab_size, first_row, group, chunk_tokens, z_loss = args
        learn = any(ctx.needs_input_grad)
        sums = torch.zeros(3, dtype=torch.float32, device=hidden.device)
        largest = torch.full((), float("-inf"), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if learn else None
        grad_head: list[torch.Tensor | None] = [None] * len(head)
        for start in range(0, targets.numel(), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            with torch.set_grad_enabled(learn):
                chunk = hidden[:, part].detach().requires_grad_(learn)
                logits = logits_of(chunk)
            with torch.no_grad():
                chunk_sums, top, grad_logits = _score(
                    logits.detach()[0], targets[part], vocab_size, first_row, group, z_loss if learn else None
                )
                sums += chunk_sums
                largest = torch.maximum(largest, top)
            if learn:
                grads = torch.autograd.grad(logits, [chunk, *head], grad_logits.to(logits.dtype).unsqueeze(0), allow_unused=True)
                grad_hidden[:, part] = grads[0]
                grad_head = [_accumulate(total, grad) for total, grad in zip(grad_head, grads[1:], strict=True)]
        if learn:
            # each tensor rank has the gradient through its own rows: one sum for the whole micro batch
            grad_hidden = all_reduce(grad_hidden, group)
            ctx.save_for_backward(grad_hidden, *grad_head)
        ctx.mark_non_differentiable(sums, largest)
        return sums[0] + z_loss * sums[1], sums, largest

    @staticmethod
    def backward(ctx, scale: torch.Tensor, *_unused: torch.Tensor):
        # `scale` is 1/tokens times the loss scale: applied here, after the sums, so that fp16 gradients do not underflow
        grads = [None if grad is None else (grad.float() * scale).to(grad.dtype) for grad in ctx.saved_tensors]
        return grads[0], None, *grads[1:]


def _accumulate(total: torch.Tensor | None, grad: torch.Tensor | None) -> torch.Tensor | None:
    if total is None or grad is None:
        return grad if total is None else total
    return total.add_(grad)


def _score(
    logits: torch.Tensor,
    targets: torch.Tensor,
    vocab_size: int,
    first_row: int,
    group: dist.ProcessGroup | None,
    z_loss: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return (sums, largest logit, gradient of cross-entropy + z_loss * log(Z)^2) of logits [tokens, rows], as above.

    The gradient is None when `z_loss` is.
    """
    scored = targets != IGNORED
    logits = logits.float().clone()
    rows = logits.shape[1]
    if first_row + rows > vocab_size:
        logits[:, max(vocab_size - first_row, 0) :] = float("-inf")
    top = all_reduce(logits.amax(dim=1), group, dist.ReduceOp.MAX)
    local = targets - first_row
    here = scored & (local >= 0) & (local < rows)
    local = local.masked_fill(~here, 0)
    chosen = torch.where(here, logits.gather(1, local.unsqueeze(1)).squeeze(1) - top, 0.0)
    exponents = logits.sub_(top.unsqueeze(1)).exp_()
    total, chosen = all_reduce(torch.stack([exponents.sum(dim=1), chosen]), group)
    log_z = total.log() + top
    cross_entropy = torch.where(scored, total.log() - chosen, 0.0)
    log_z_scored = torch.where(scored, log_z, 0.0)
    sums = torch.stack([cross_entropy.sum(), log_z_scored.square().sum(), log_z_scored.sum()])
    largest = top.masked_fill(~scored, float("-inf")).amax()
    if z_loss is None:
        return sums, largest, None
    weight = torch.where(scored, (1.0 + 2.0 * z_loss * log_z) / total, 0.0)
    grad = exponents.mul_(weight.unsqueeze(1))
    grad.scatter_add_(1, local.unsqueeze(1), -here.to(grad.dtype).unsqueeze(1))
    return sums, largest, grad
