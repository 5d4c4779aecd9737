"""Spreads a mixture's experts over data ranks: tokens travel to the rank of the expert that they chose, and back.

A rank sorts its (token, choice) pairs by expert, sends each token to the expert's rank, runs its own experts on what it receives,
and weighs what comes back. Nothing is dropped and nothing is padded, so how many tokens travel is known on the device alone: the
host reads these counts once in each pass of a layer, and waits for them.

    tokens [n, hidden] -> by expert [n k, hidden] -> all-to-all -> experts -> all-to-all -> by token [n, k, hidden] -> weighed sum

Every rank takes part in both exchanges of both passes, also one that no token has chosen. An expert's gradient is then the sum
over the tokens of all expert ranks, and the mean over data ranks is taken over those that have the same experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from recipes.common.parallel.experts import CALLED, skip_absent_experts
from recipes.common.parallel.grid import Grid
from recipes.common.runtime.step_clock import CLOCK, num_bytes


def spread_experts(causal: nn.Module, plan: dict[str, str], grid: Grid) -> None:
    """Let this stage's modules of experts, which hold this rank's part, exchange tokens. Call it before tensor parallelism.

    plan: see `experts.expert_plan`; empty where experts are not spread.
    """
    modules = dict(causal.named_modules())
    for name in (name for name, style in plan.items() if style == CALLED and name in modules):
        _exchange_tokens(modules[name], grid)


def _exchange_tokens(module: nn.Module, grid: Grid) -> None:
    forward, group, size = module.forward, grid.expert_group, grid.expert
    count = next(module.parameters(recurse=False)).shape[0]
    skip_absent_experts(module, count)

    def run(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        chosen, order, sent, received, ids = _plan_exchange(top_k_index, count, size, group)
        tokens = exchange_rows(hidden_states[order // top_k_index.shape[1]], sent, received, group)
        done = _run_experts(forward, tokens, ids)
        back = exchange_rows(done, received, sent, group)
        by_choice = back.new_zeros(chosen, back.shape[1]).index_copy(0, order, back)
        weighed = by_choice.view(*top_k_index.shape, -1) * top_k_weights.unsqueeze(-1)
        return weighed.sum(dim=1).to(hidden_states.dtype)

    module.forward = run


def _plan_exchange(
    top_k_index: torch.Tensor, count: int, size: int, group: dist.ProcessGroup
) -> tuple[int, torch.Tensor, list[int], list[int], torch.Tensor]:
    """Return (choices, those that travel in the order of their experts, rows to each rank, rows from each, experts of those).

    count: experts of a rank. An index beyond all ranks' experts does not travel.
    """
    index = top_k_index.reshape(-1)
    order = torch.argsort(index, stable=True)
    of_expert = torch.zeros(size * count + 1, dtype=torch.int64, device=index.device)
    of_expert.scatter_add_(0, index.clamp(max=size * count), torch.ones_like(index))
    counts = of_expert[:-1].view(size, count)
    theirs = torch.empty_like(counts)
    with CLOCK.collective("all_to_all_single", num_bytes(counts), group):
        dist.all_to_all_single(theirs, counts, group=group)
    sent, received = torch.stack([counts.sum(1), theirs.sum(1)]).tolist()  # the host waits
    local = torch.arange(count, device=index.device).repeat(size)
    ids = local.repeat_interleave(theirs.reshape(-1), output_size=sum(received))
    return len(index), order[: sum(sent)], sent, received, ids


def _run_experts(forward: Any, tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Run this rank's experts, each row with one of them at weight 1; without a row, on one that leaves no trace."""
    rows = len(tokens)
    if not rows:  # the experts and the exchange stay in the graph
        tokens, ids = tokens.sum(0, keepdim=True), ids.new_zeros(1)
    out = forward(tokens, ids.unsqueeze(1), tokens.new_ones(len(tokens), 1))
    return out[:rows]


def exchange_rows(x: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Send the rows of x [sum of sent, width] to the ranks of a group in turn. The gradient goes the same way back."""
    return _ExchangeRows.apply(x, sent, received, group)


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> torch.Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all_rows(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _all_to_all_rows(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def _all_to_all_rows(x: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    x = x.contiguous()
    out = x.new_empty(sum(received), x.shape[1])
    with CLOCK.collective("all_to_all_single", num_bytes(x), group):
        dist.all_to_all_single(out, x, received, sent, group=group)
    return out
