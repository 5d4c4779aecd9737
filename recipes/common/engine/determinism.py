"""Switches torch to what a recipe's level of determinism promises, before anything is computed."""

from __future__ import annotations

import torch

from recipes.common.config.determinism_levels import BITWISE, ROUNDING, promises


def set_determinism(level: str) -> None:
    """Set this process's switches of torch. "order", the default, sets none."""
    if promises(level, ROUNDING):
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    if promises(level, BITWISE):
        torch.use_deterministic_algorithms(True)  # a kernel without an order of its own is an error then
        torch.utils.deterministic.fill_uninitialized_memory = False  # it would write NaN into all memory that is taken
        torch.backends.cudnn.benchmark = False
