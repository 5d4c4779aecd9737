"""Exchanges the attention of an unmodified model: transformers looks up a function for it, and one for its mask, by a name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Attention = tuple[torch.Tensor, torch.Tensor | None]


def attention_function(module: nn.Module, attention: str) -> Callable[..., Attention]:
    """Return the function by which a family's attention module would compute."""
    family = sys.modules[type(module).__module__]
    table = getattr(family, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)  # a family may have one of its own
    return table.get(attention) or family.eager_attention_forward


def attach(causal: PreTrainedModel, attend: Callable[..., Attention], mask: Callable[..., Any]) -> None:
    """Let a model, whose config is its own, call `attend` and `mask` through transformers' tables."""
    name = f"attached_{id(causal):x}"
    ALL_ATTENTION_FUNCTIONS.register(name, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask)
    causal.config._attn_implementation = name
