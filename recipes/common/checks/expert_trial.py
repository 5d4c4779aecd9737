"""Tries on a tiny model whether a mixture's experts may be apart: halves, with what is routed to them, give what all give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from recipes.common.checks.expert_checks import expert_problems
from recipes.common.model.decoder import PlanError, Stack
from recipes.common.parallel.experts import CALLED, expert_plan, skip_absent_experts
from recipes.common.parallel.grid import one_process
from recipes.common.parallel.tiny_model import shrink
from recipes.common.pipeline.stage import build_stage, plan_model
from recipes.common.recipe import WHOLE, Layout

_SEQS, _SEQ_LEN = 2, 16
_ROUNDING = 1e-4


def shared_expert_problems(
    config: PreTrainedConfig, causal: PreTrainedModel, stack: Stack, layout: Layout, attention: str
) -> list[str]:
    """Check whether ranks can share the experts of a model, by its numbers and by a trial of its family."""
    return expert_problems(causal, stack, layout) or expert_trial_problems(config, layout, attention)


def expert_trial_problems(config: PreTrainedConfig, layout: Layout, attention: str) -> list[str]:
    """Check a family whose experts ranks share whole: that experts are called as they all are, and nothing else is in them."""
    if layout.expert == 1 and layout.experts != WHOLE:
        return []
    asked = f"layout expert={layout.expert}" if layout.expert > 1 else f"layout experts={layout.experts!r}"
    family = config.model_type
    try:
        difference = _differ(shrink(config, Layout(expert=2)), attention)
    except PlanError as error:
        return [f"{asked}: {error}; leave it out"]
    except Exception as error:  # a family's own code may raise anything
        return [f"{asked}: a tiny {family} does not run with it ({type(error).__name__}: {error}); leave it out"]
    if difference <= _ROUNDING:
        return []
    return [
        f"{asked}: half of the experts of model_type={family} do not give their part of what all give (a tiny model of it "
        f"differs by {difference:.1e}); leave it out"
    ]


def _differ(config: PreTrainedConfig, attention: str) -> float:
    """Return the largest difference, as a part of the largest value."""
    planned = plan_model(config, attention=attention)
    names = [name for name, style in expert_plan(planned.causal, planned.stack).items() if style == CALLED]
    stage = build_stage(planned, one_process(), seq_len=_SEQ_LEN).eval()
    differences = [0.0]
    for name in names:
        module = stage.causal.get_submodule(name)
        module.forward = partial(_both_ways, module, module.forward, differences)
    with torch.no_grad():
        stage(torch.arange(_SEQS * _SEQ_LEN).view(_SEQS, _SEQ_LEN) % (stage.vocab_size - 3) + 3)
    return max(differences)


def _both_ways(
    module: nn.Module,
    forward: Any,
    differences: list[float],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    together = forward(hidden_states, top_k_index, top_k_weights)
    half = next(module.parameters(recurse=False)).shape[0] // 2
    rows, chosen = hidden_states.repeat_interleave(top_k_index.shape[1], 0), top_k_index.reshape(-1)
    by_choice, summed = torch.zeros(len(rows), together.shape[-1]), torch.zeros_like(together)
    for first in (0, half):
        own = (chosen >= first) & (chosen < first + half)
        with _only(module, first, half):
            ids = (chosen[own] - first).unsqueeze(1)
            by_choice[own] = forward(rows[own], ids, torch.ones(ids.shape)).float()
            absent = ~own.view_as(top_k_index)
            local = (top_k_index - first).masked_fill(absent, half)
            summed += forward(hidden_states, local, top_k_weights.masked_fill(absent, 0.0))
    apart = (by_choice.view(*top_k_index.shape, -1) * top_k_weights.unsqueeze(-1)).sum(1)
    largest = together.abs().max().item()
    differences += [(each - together).abs().max().item() / max(largest, 1e-9) for each in (apart, summed)]
    return together


@contextmanager
def _only(module: nn.Module, first: int, count: int) -> Iterator[None]:
    """Leave a module of experts, for a while, only some of them."""
    held, number, apart = dict(module._parameters), module.num_experts, getattr(module, "_is_expert_parallel", False)
    module._parameters.update(
        {leaf: nn.Parameter(bank[first : first + count]) for leaf, bank in held.items() if bank is not None}
    )
    skip_absent_experts(module, count)
    try:
        yield
    finally:
        module._parameters.update(held)
        module.num_experts, module._is_expert_parallel = number, apart
