"""Checks how a layout shares a mixture's experts between ranks."""

from __future__ import annotations

from transformers import PreTrainedModel

from recipes.common.model.decoder import PlanError, Stack
from recipes.common.parallel.experts import BANK, expert_plan
from recipes.common.recipe import EXPERTS, SLICES, WHOLE, Layout


def expert_option_problems(layout: Layout, prefix: str = "") -> list[str]:
    """Check the options of a layout by themselves."""
    if layout.experts not in EXPERTS:
        return [f"{prefix}experts={layout.experts!r} must be one of {', '.join(map(repr, EXPERTS))}"]
    if layout.experts != SLICES and layout.tensor == 1:
        return [f"{prefix}experts={layout.experts!r} with tensor=1: no tensor ranks could share experts; leave it out"]
    return []


def expert_problems(causal: PreTrainedModel, stack: Stack, layout: Layout) -> list[str]:
    """Check that the model, on the meta device, has experts that can be shared so."""
    if layout.experts != WHOLE:
        return []
    asked = f"layout experts={layout.experts!r}"
    try:
        plan = expert_plan(causal, stack)
    except PlanError as error:
        return [f"{asked}: {error}; leave it out"]
    for name in (name for name, style in plan.items() if style == BANK):
        count = causal.get_parameter(name).shape[0]
        if count % layout.tensor:
            fitting = [size for size in range(2, layout.tensor) if count % size == 0]
            sizes = f"tensor={' or '.join(map(str, fitting))}, or " if fitting else ""
            return [
                f"{asked}: {name} has {count} experts, not a multiple of tensor={layout.tensor}; use {sizes}experts={SLICES!r}"
            ]
    return []
