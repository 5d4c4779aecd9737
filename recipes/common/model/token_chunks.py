"""Computes a layer's MLP for a part of its tokens at a time, so that its wide hidden states exist for that part only.

An MLP treats each token by itself. Each part is computed again in the backward pass: between the passes only the MLP's input is
kept, which the layer keeps anyway.
"""

from __future__ import annotations

import torch
from torch import nn

from recipes.common.model.decoder import PlanError
from recipes.common.model.recompute import computed_again

MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "ffn")  # in transformers 5, exact


def find_mlp(layer: nn.Module) -> nn.Module:
    """Return a decoder layer's MLP. Raises PlanError when it has none by a known name."""
    name = next((name for name in MLP_NAMES if hasattr(layer, name)), None)
    if name is None:
        raise PlanError(f"{type(layer).__name__} has no MLP by one of the names {', '.join(MLP_NAMES)}")
    return getattr(layer, name)


def chunk_tokens(mlp: nn.Module, tokens: int) -> None:
    """Let `mlp` compute [seqs, length, width] for so many tokens at a time, whatever sequence they are of."""
    forward = mlp.forward
    again = computed_again(forward)

    def run(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[:2].numel() <= tokens:
            return forward(hidden)
        parts = hidden.reshape(1, -1, hidden.shape[-1]).split(tokens, dim=1)  # contiguous, as some families expect
        return torch.cat([again(part) for part in parts], dim=1).view_as(hidden)

    mlp.forward = run
