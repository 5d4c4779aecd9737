"""Seeds dropout so that it does not depend on what ran before."""

from __future__ import annotations

import torch

from recipes.common.model.initial_weights import name_seed
from recipes.common.parallel.grid import Grid


def seed_dropout(seed: int, step: int, grid: Grid) -> None:
    """Seed torch by the step alone, so that resuming repeats it, and alike on the tensor ranks of a data rank's stage."""
    chosen = dropout_seed(seed, step, data_rank=grid.data_rank, stage=grid.pipeline_rank)
    torch.default_generator.manual_seed(chosen)  # `torch.manual_seed` takes 5 ms: it asks every kind of device
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(chosen)


def dropout_seed(seed: int, step: int, *, data_rank: int, stage: int) -> int:
    """Return the seed of a step's dropout on one rank."""
    return name_seed(seed, f"step {step}, data {data_rank}, stage {stage}")
