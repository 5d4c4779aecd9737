"""Says how a step's tokens were spread over the experts of a mixture, by what the trainer has counted anyway.

load             of an expert: its tokens over the mean of its router's experts (1: balanced, 0: dead)
load_evenness    of a router: entropy of its experts' shares of the tokens, 1 where all are equal, 0 where every token goes to
                 the same few experts
entropy          of a router: mean entropy of its softmax, 1 where it knows no preference, 0 where it is sure
dead             of a router: experts without a token in the whole step
"""

from __future__ import annotations

import math

import numpy as np

from recipes.common.engine.trainer import StepResult
from recipes.common.model.routers import RouterPlan
from recipes.common.parallel.router_losses import RouterLosses


def expert_names(plan: RouterPlan) -> tuple[str, ...]:
    """Return a name for each load, in order: the router's, and the expert's number."""
    return tuple(f"{router.name} {expert}" for router in plan.routers for expert in range(plan.experts))


def expert_values(result: StepResult) -> dict[str, np.ndarray]:
    """Return statistic -> [routers x experts]."""
    return {"load": _over_mean(result.router_loads).flatten()}


def router_values(result: StepResult, plan: RouterPlan) -> dict[str, np.ndarray]:
    """Return statistic -> [routers]."""
    loads = result.router_loads
    return {
        "load_evenness": _evenness(loads, plan.chosen),
        "entropy": result.router_entropies / math.log(max(plan.experts, 2)),
        "dead": (loads == 0).sum(axis=1).astype(float),
    }


def router_fields(result: StepResult, losses: RouterLosses | None) -> dict[str, float]:
    """Return fields for the step's record, the worst router's; none for a model without routers."""
    if losses is None:
        return {}
    plan, values = losses.plan, router_values(result, losses.plan)
    fields = {"router_loss": result.router_loss} if plan.balances else {}
    if plan.z_loss:
        fields["router_log_z_squared"] = result.router_log_z_squared
    return fields | {
        "router_load_max/max": float(_over_mean(result.router_loads).max()),
        "load_evenness": float(values["load_evenness"].min()),
        "router_entropy": float(values["entropy"].min()),
        "dead_experts": int(values["dead"].sum()),
    }


def _over_mean(loads: np.ndarray) -> np.ndarray:
    return loads / np.maximum(loads.mean(axis=1, keepdims=True), np.finfo(float).tiny)


def _evenness(loads: np.ndarray, chosen: int) -> np.ndarray:
    experts = loads.shape[1]
    if experts <= chosen:  # every token goes to every expert
        return np.ones(len(loads))
    shares = loads / np.maximum(loads.sum(axis=1, keepdims=True), 1)
    entropies = -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(axis=1)
    return np.clip((entropies - math.log(chosen)) / (math.log(experts) - math.log(chosen)), 0.0, 1.0)
