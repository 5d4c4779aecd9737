"""Leaving out a step whose gradient norm is too high, before it changes anything.

DeepSpeed asks `is_invalid_grad_norm` of the global norm between the backward pass and the optimizer, in every ZeRO optimizer, and
leaves the step out on all ranks where it says so. The gate stands in for that function: it also refuses what is over a ceiling.
"""

from __future__ import annotations

import math
from typing import Any

import deepspeed.runtime.bf16_optimizer
import deepspeed.runtime.zero.stage3
import deepspeed.runtime.zero.stage_1_and_2
import torch
import torch.distributed as dist
from deepspeed.runtime.utils import is_invalid_grad_norm

_MODULES = (deepspeed.runtime.bf16_optimizer, deepspeed.runtime.zero.stage_1_and_2, deepspeed.runtime.zero.stage3)


class NormGate:
    """One engine's. While `ceiling` is infinite it is DeepSpeed's own function."""

    def __init__(self, device: torch.device) -> None:
        self.refused_norm: float | None = None  # of the last step, in the gradients' own units; None where it passed
        self._device, self._ceiling, self._scale, self._decided = device, math.inf, 1.0, False
        for module in _MODULES:
            assert hasattr(module, "is_invalid_grad_norm"), f"{module.__name__} judges its norm in another way"
            module.is_invalid_grad_norm = self._refuses

    def open(self, ceiling: float, loss_scale: float) -> None:
        """Before each step. ceiling: in the gradients' own units, not the scaled ones."""
        self.refused_norm, self._ceiling, self._scale, self._decided = None, ceiling, loss_scale, False

    def _refuses(self, norm: Any) -> bool:
        invalid = is_invalid_grad_norm(norm)
        if self._ceiling == math.inf or self._decided:
            return invalid
        self._decided = True
        # groups of ranks sum in orders of their own: on the ceiling itself the last bit must not decide differently
        high = torch.tensor([float(not invalid and float(norm) > self._ceiling * self._scale)], device=self._device)
        if dist.get_world_size() > 1:
            dist.all_reduce(high, op=dist.ReduceOp.MAX)
        if high.item():
            self.refused_norm = float(norm) / self._scale
        return invalid or self.refused_norm is not None
