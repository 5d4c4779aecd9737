"""Seeds dropout so that it does not depend on what ran before."""

from __future__ import annotations

import torch

from recipes.common.model.initial_weights import name_seed
from recipes.common.parallel.grid import Grid


def seed_dropout(seed: int, step: int, grid: Grid) -> None:
    """Seed torch by the step alone, so that resuming repeats it, and alike on the tensor ranks of a data rank's stage."""
    torch.manual_seed(name_seed(seed, f"step {step}, data {grid.data_rank}, stage {grid.pipeline_rank}"))
