"""Computes next-token cross-entropy on a vocabulary sharded over the tensor ranks, a chunk of tokens at a time.

Full logits never exist: a chunk's logits [tokens, vocabulary / tensor] live only while its loss and its gradient are computed,
both in the forward pass (the idea of Liger's fused linear cross-entropy, arXiv 2410.10989). Their gradient takes the logits'
place, and the head's is added up in fp32. The family's own code turns hidden states into logits, so soft-caps and logit scales
are kept.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from recipes.common.model.fused_ops import compiled_operator, compiled_update
from recipes.common.model.gradient_sums import GradientSums, StepSums
from recipes.common.model.main_grads import main_grad_of
from recipes.common.parallel.collectives import all_reduce

_ROUNDED = 1e-5  # relative: a factor and what the backward pass multiplies by are computed in different orders
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
    head_sums: GradientSums | StepSums | None = None,
    factor: torch.Tensor | None = None,
    compiled: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (loss [], sums [3] of cross-entropy, log(Z)^2 and log(Z), largest logit []) over the scored tokens; fp32.

    logits_of: hidden [1, tokens, width] -> this rank's logits [1, tokens, rows]; uses the parameters in `head`.
    hidden: [micro_seqs, seq_len, width]; targets: [micro_seqs, seq_len], IGNORED where not scored.
    vocab_size: rows of the whole vocabulary; `first_row` is this rank's first one, rows past the end are padding.
    head_sums: where `logits_of` puts gradients of `head` that it does not give to autograd.
    factor: [], fp32, by what the backward pass will multiply the first result's gradient, where that is known. Gradients have it
    from the logits' on, and with StepSums the head's go where they belong. A pass that multiplies by another makes them NaN.
    compiled: read and write the logits in two compiled kernels.
    The first result is cross-entropy + z_loss * log(Z)^2; only it carries a gradient. The largest of no logits is -inf.
    """
    flat = hidden.reshape(1, -1, hidden.shape[-1])
    score = _score_compiled if compiled else _score
    sums = GradientSums() if head_sums is None else head_sums
    assert factor is not None or not isinstance(sums, StepSums), "a step's sums would have gradients of another scale"
    args = (logits_of, targets.reshape(-1), vocab_size, first_row, group, chunk_tokens, z_loss, sums, score, factor)
    return _VocabularyLoss.apply(flat, args, *head)


def last_part_share(tokens: int, chunk_tokens: int) -> float:
    """Return which share of a micro batch's tokens the loss computes last, whose weight gradient may wait (see StepSums)."""
    return ((tokens - 1) % chunk_tokens + 1) / tokens


@dataclass(frozen=True)
class _Rows:
    """Where each target [tokens] lies among this rank's rows."""

    scored: torch.Tensor
    here: torch.Tensor  # scored, and in one of this rank's rows
    local: torch.Tensor  # that row, from 0 on; 0 where there is none
    padding: slice  # rows past the end of the vocabulary

    def of(self, part: slice) -> _Rows:
        return _Rows(self.scored[part], self.here[part], self.local[part], self.padding)


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: torch.Tensor, args: tuple, *head: torch.nn.Parameter):
        logits_of, targets, vocab_size, first_row, group, chunk_tokens, z_loss, head_sums, score, factor = args
        learn = any(ctx.needs_input_grad)
        tokens = targets.numel()
        found = torch.empty(3, tokens, dtype=torch.float32, device=hidden.device)  # largest logit, Z / e^that, target's - that
        grad_hidden = torch.empty_like(hidden) if learn else None
        rows, shared = None, False
        for start in range(0, tokens, chunk_tokens):
            part = slice(start, start + chunk_tokens)
            with torch.set_grad_enabled(learn), _saved_storages(learn and start == 0) as saved:
                chunk = hidden[:, part].detach().requires_grad_(learn)
                logits = logits_of(chunk)
            with torch.no_grad():
                values = logits.data[0]  # not autograd's concern: what it saved is looked at here
                if rows is None:
                    rows, shared = _locate(targets, vocab_size, first_row, values.shape[1]), _storage(values) in saved
                    scale = hidden.new_ones((), dtype=torch.float32) if factor is None else factor
                scores = values.clone() if shared else values
                found[:, part] = score(scores, rows.of(part), group, z_loss if learn else None, scale)
            if learn:
                if start + chunk_tokens >= tokens:
                    head_sums.begin_last_part()
                grads = torch.autograd.grad(logits, [chunk, *head], scores.unsqueeze(0), allow_unused=True)
                grad_hidden[:, part] = grads[0]
                for parameter, grad in zip(head, grads[1:], strict=True):
                    if grad is not None:
                        head_sums.add(parameter, grad)
            del logits, values, scores  # before the next ones are made
        if learn:
            # each tensor rank has the gradient through its own rows: one sum for the whole micro batch
            ctx.gradients = [all_reduce(grad_hidden, group, own=True), *head_sums.take(list(head))]
            ctx.dtype, ctx.head, ctx.factor = hidden.dtype, head, factor
        sums, largest = _sums(*found, targets != IGNORED)
        ctx.mark_non_differentiable(sums, largest)
        return sums[0] + z_loss * sums[1], sums, largest

    @staticmethod
    def backward(ctx, scale: torch.Tensor, *_unused: torch.Tensor):
        # `scale` is 1/tokens times the loss scale: applied here, after the sums, so that fp16 gradients do not underflow; or all
        # have it, which `factor` is
        of_hidden, *of_head = ctx.gradients
        del ctx.gradients
        if ctx.factor is not None:
            scale = scale / ctx.factor
            right = (scale - 1.0).abs() < _ROUNDED
            scale = torch.where(right, 1.0, torch.nan)
            for parameter in ctx.head:
                if (main_grad := main_grad_of(parameter)) is not None:
                    main_grad.spoil_unless(right)
        given = [_give(parameter, grad, scale) for parameter, grad in zip(ctx.head, of_head, strict=True)]
        return _scaled(of_hidden, scale, ctx.dtype), None, *given


def _locate(targets: torch.Tensor, vocab_size: int, first_row: int, rows: int) -> _Rows:
    scored, local = targets != IGNORED, targets - first_row
    here = scored & (local >= 0) & (local < rows)
    return _Rows(scored, here, local.masked_fill(~here, 0), slice(min(max(vocab_size - first_row, 0), rows), rows))


@contextlib.contextmanager
def _saved_storages(watch: bool) -> Iterator[set[int]]:
    """Give the storages that autograd saves meanwhile: a family may compute its gradient from its logits, as a tanh does."""
    saved: set[int] = set()

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        saved.add(_storage(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor) if watch else contextlib.nullcontext():
        yield saved


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _score(
    logits: torch.Tensor, rows: _Rows, group: dist.ProcessGroup | None, z_loss: float | None, scale: torch.Tensor
) -> torch.Tensor:
    """Return fp32 [3, tokens]: each token's largest logit, Z over its exponential, and the target's logit less the largest.

    logits: [tokens, rows]. They are overwritten: with their gradient, of scale * (cross-entropy + z_loss * log(Z)^2), unless
    `z_loss` is None.
    """
    _fill_padding(logits, rows)
    top = all_reduce(logits.amax(dim=1).float(), group, dist.ReduceOp.MAX, own=True)
    local = rows.local.unsqueeze(1)
    chosen = torch.where(rows.here, logits.gather(1, local).squeeze(1) - top, 0.0)
    place = logits if logits.dtype == torch.float32 else None  # else the only fp32 copy
    exponents = torch.sub(logits, top.unsqueeze(1), out=place).exp_()
    total, chosen = all_reduce(torch.stack([exponents.sum(dim=1), chosen]), group, own=True)
    if z_loss is not None:
        weight = _weights(top, total, rows, z_loss) * scale
        at_target = exponents.gather(1, local).squeeze(1) * weight - rows.here * scale
        torch.mul(exponents, weight.unsqueeze(1), out=logits)  # rounds once
        logits.scatter_(1, local, at_target.to(logits.dtype).unsqueeze(1))
    return torch.stack([top, total, chosen])


def _score_compiled(
    logits: torch.Tensor, rows: _Rows, group: dist.ProcessGroup | None, z_loss: float | None, scale: torch.Tensor
) -> torch.Tensor:
    """Do the same as `_score` with one compiled kernel that reads the logits and one that overwrites them."""
    statistics, become_gradients = _compiled_kernels()
    _fill_padding(logits, rows)
    own_top, own_total = statistics([logits])
    top = all_reduce(own_top, group, dist.ReduceOp.MAX)
    local = rows.local.unsqueeze(1)
    at_target = logits.gather(1, local).squeeze(1) - top
    parts = torch.stack([own_total * (own_top - top).exp(), torch.where(rows.here, at_target, 0.0)])
    total, chosen = all_reduce(parts, group, own=True)
    if z_loss is not None:
        weight = _weights(top, total, rows, z_loss) * scale
        become_gradients(logits, [top, weight])
        target_gradient = at_target.exp() * weight - rows.here * scale
        logits.scatter_(1, local, target_gradient.to(logits.dtype).unsqueeze(1))
    return torch.stack([top, total, chosen])


def _weights(top: torch.Tensor, total: torch.Tensor, rows: _Rows, z_loss: float) -> torch.Tensor:
    """Return by what the exponentials of each token are multiplied in the gradient: it is 0 where none is scored."""
    return torch.where(rows.scored, (1.0 + 2.0 * z_loss * (total.log() + top)) / total, 0.0)


def _fill_padding(logits: torch.Tensor, rows: _Rows) -> None:
    """Give the rows past the vocabulary's end the probability 0, on a rank that has no others too."""
    if rows.padding.start < rows.padding.stop:
        logits[:, rows.padding] = torch.finfo(logits.dtype).min


@functools.cache
def _compiled_kernels() -> tuple[Callable, Callable]:
    def statistics(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = logits.float()
        top = values.amax(dim=1)
        return top, (values - top.unsqueeze(1)).exp().sum(dim=1)

    def shapes(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return logits.new_empty(len(logits), dtype=torch.float32), logits.new_empty(len(logits), dtype=torch.float32)

    def gradients(logits: torch.Tensor, top: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (logits.float() - top.unsqueeze(1)).exp() * weight.unsqueeze(1)

    return compiled_operator("logits_read", "", statistics, shapes), compiled_update("logits_to_gradients", gradients)


def _sums(
    top: torch.Tensor, total: torch.Tensor, chosen: torch.Tensor, scored: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (sums [3] of cross-entropy, log(Z)^2 and log(Z), largest logit []) over the scored of all tokens."""
    log_total = total.log()
    log_z = torch.where(scored, log_total + top, 0.0)
    cross_entropy = torch.where(scored, log_total - chosen, 0.0)
    sums = torch.stack([cross_entropy, log_z.square(), log_z]).sum(dim=1)
    return sums, top.masked_fill(~scored, float("-inf")).amax()


def _give(parameter: torch.nn.Parameter, grad: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor | None:
    """Return a parameter's gradient, or nothing where it is added to its sum."""
    main_grad = main_grad_of(parameter)
    if grad is None or main_grad is None:
        return None if grad is None else _scaled(grad, scale, parameter.dtype)
    main_grad.add(grad, scale)
    return None


def _scaled(grad: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return grad * scale, computed in fp32 and rounded once; `grad` may be overwritten."""
    out = grad if grad.dtype == dtype else torch.empty_like(grad, dtype=dtype)
    return torch.mul(grad, scale.view((1,) * grad.ndim), out=out)
