"""Gives a stage its weights: this rank's part of each, as drawn for the whole model."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from recipes.common.model.decoder import Stack
from recipes.common.model.initial_weights import draw_weights
from recipes.common.model.sharding import Holdings, TensorPlan
from recipes.common.parallel.experts import BANK
from recipes.common.parallel.grid import Grid


def holdings(tensor_plan: TensorPlan, experts: dict[str, str], grid: Grid) -> Holdings:
    """Return which part of every parameter this rank holds. experts: those that expert ranks divide, by `expert_plan`."""
    banks = frozenset(name for name, style in experts.items() if style == BANK)
    ranks = {"tensor_rank": grid.tensor_rank, "tensor": grid.tensor, "expert_rank": grid.expert_rank, "expert": grid.expert}
    return Holdings(shards=tensor_plan.shards, banks=banks, **ranks)


def draw_stage(
    causal: PreTrainedModel, stack: Stack, embedding: nn.Module, held: Holdings, grid: Grid, seed: int | None
) -> Holdings:
    """Give what is left of a model its initial weights, and tie the head to the embedding, the whole model's. Returns `held`."""
    draw_weights(causal, causal, "", seed=seed, held=held)
    if grid.is_last_stage and stack.tied:
        if not grid.is_first_stage:  # the embedding was taken out, but its weight is the head's
            draw_weights(causal, embedding, stack.embedding, seed=seed, held=held)
        causal.get_submodule(stack.head).weight = embedding.weight
    return held
