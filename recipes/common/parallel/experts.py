"""Gives every rank whole experts of a mixture, in place of a slice of each.

Families say which parameters are their banks of experts, and which module calls them, in `base_model_ep_plan`; and they call it
alike: experts(hidden_states [tokens, hidden], top_k_index [tokens, k], top_k_weights [tokens, k]). An index that equals the
number of experts is skipped, so that a rank may leave out what others compute.
"""

from __future__ import annotations

import re

import torch
from torch import nn
from transformers import PreTrainedModel

from recipes.common.model.decoder import PlanError, Stack
from recipes.common.parallel.collectives import copy_to, reduce_from, sum_gradient
from recipes.common.parallel.grid import Grid

BANK, CALLED = "grouped_gemm", "ep_dispatch_experts"  # transformers' styles, of parameters and of the module that has them


def expert_plan(causal: PreTrainedModel, stack: Stack) -> dict[str, str]:
    """Return parameter or module -> BANK or CALLED, by names from the ForCausalLM's root.

    Raises PlanError for a model without experts, or whose family does not say which parameters they are.
    """
    family, base = causal.config.model_type, causal.get_submodule(stack.base)
    patterns = getattr(type(causal.config), "base_model_ep_plan", None) or {}
    if unknown := sorted(set(patterns.values()) - {BANK, CALLED}):
        raise PlanError(f"model_type={family}: its plan of experts (base_model_ep_plan) has the styles {unknown}")
    names = [name for name, _ in base.named_modules() if name] + [name for name, _ in base.named_parameters()]
    plan = {}
    for pattern, style in patterns.items():
        rule = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
        plan.update({f"{stack.base}.{name}": style for name in names if rule.fullmatch(name)})
    if BANK not in plan.values() or CALLED not in plan.values():
        why = "this model has no experts" if patterns else "it has no plan of experts (base_model_ep_plan)"
        raise PlanError(f"model_type={family}: {why}")
    return plan


def bank_names(causal: PreTrainedModel, stack: Stack) -> list[str]:
    """Return the parameters that are banks of experts. Raises PlanError as `expert_plan` does."""
    return [name for name, style in expert_plan(causal, stack).items() if style == BANK]


def with_whole_experts(plan: dict[str, str], causal: PreTrainedModel, stack: Stack) -> dict[str, str]:
    """Return a tensor-parallel plan in which tensor ranks have whole experts. Raises PlanError as `expert_plan` does."""
    experts = expert_plan(causal, stack)
    owners = [name for name, style in experts.items() if style == CALLED]
    kept = {n: s for n, s in plan.items() if not any(n == owner or n.startswith(f"{owner}.") for owner in owners)}
    return kept | experts


def connect_whole_experts(module: nn.Module, grid: Grid) -> None:
    """Let a module that holds this tensor rank's experts compute what is routed to them; the sum over the ranks is the output."""
    forward, group = module.forward, grid.tensor_group
    own = next(module.parameters(recurse=False)).shape[0]
    count = own * grid.expert  # of this tensor rank, over the expert ranks
    first = grid.tensor_rank * count
    skip_absent_experts(module, own)
    for parameter in module.parameters():
        if not getattr(parameter, "tensor_model_parallel", False):  # what all experts share sees this rank's tokens only
            sum_gradient(parameter, group)

    def run(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        local = top_k_index - first
        absent = (local < 0) | (local >= count)
        weights = copy_to(top_k_weights, group).masked_fill(absent, 0.0)
        return reduce_from(forward(copy_to(hidden_states, group), local.masked_fill(absent, count), weights), group)

    module.forward = run


def skip_absent_experts(module: nn.Module, count: int) -> None:
    """Tell a module of experts that it has `count`: what it does with an index of `count` is left out of its output."""
    module.num_experts = count
    module._is_expert_parallel = True  # transformers' mark: grouped products leave rows of no expert uninitialised
