"""Checks how a layout shares a mixture's experts between ranks."""

from __future__ import annotations

from transformers import PreTrainedModel

from recipes.common.model.decoder import PlanError, Stack
from recipes.common.parallel.experts import bank_names
from recipes.common.recipe import EXPERTS, SLICES, WHOLE, Layout


def expert_option_problems(layout: Layout, prefix: str = "") -> list[str]:
    """Check the options of a layout by themselves."""
    if layout.experts not in EXPERTS:
        return [f"{prefix}experts={layout.experts!r} must be one of {', '.join(map(repr, EXPERTS))}"]
    if layout.experts != SLICES and layout.tensor == 1:
        return [f"{prefix}experts={layout.experts!r} with tensor=1: no tensor ranks could share experts; leave it out"]
    return []


def expert_size_problems(layout: Layout, data: int, prefix: str = "") -> list[str]:
    """Check that expert ranks are whole groups of the data ranks."""
    if data % layout.expert == 0:
        return []
    fitting = " or ".join(str(size) for size in range(1, layout.expert) if data % size == 0)
    return [f"{prefix}expert={layout.expert} does not divide {data} data ranks; use expert={fitting}"]


def expert_problems(causal: PreTrainedModel, stack: Stack, layout: Layout) -> list[str]:
    """Check that the model, on the meta device, has experts that can be shared so."""
    tensor = layout.tensor if layout.experts == WHOLE else 1
    ranks, without = layout.expert * tensor, f"experts={SLICES!r}" if layout.expert == 1 else "expert=1"
    if ranks == 1:
        return []
    asked = ", ".join([f"expert={layout.expert}"] * (layout.expert > 1) + [f"experts={layout.experts!r}"] * (tensor > 1))
    try:
        names = bank_names(causal, stack)
    except PlanError as error:
        return [f"layout {asked}: {error}; leave it out"]
    for name in names:
        count = causal.get_parameter(name).shape[0]
        if count % ranks:
            shared = f"expert={layout.expert} x tensor={tensor}" if layout.expert > 1 < tensor else f"{ranks} ranks"
            return [f"layout {asked}: {name} has {count} experts, not a multiple of {shared}; use a size that fits, or {without}"]
    return []
