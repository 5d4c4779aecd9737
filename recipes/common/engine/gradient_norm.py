"""The gradient norm of the whole model, to the same last bit however the model is cut.

DeepSpeed rounds each rank's sum of squares to fp32 before it adds up ranks, so the norm, and with clipping every weight, depends
in its last bits on which rank holds what; and it asks four groups one after another. Here squares are added up in fp64 on all
ranks at once and rounded at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import deepspeed.runtime.bf16_optimizer
import deepspeed.runtime.zero.stage3
import deepspeed.runtime.zero.stage_1_and_2
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import is_invalid_grad_norm, is_model_parallel_parameter
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from recipes.common.parallel.grid import Grid
from recipes.common.runtime.step_clock import CLOCK, num_bytes

INVALID = -1.0  # DeepSpeed's word for a norm that is not a number


def use_exact_norm(optimizer: Any, grid: Grid) -> None:
    """Let DeepSpeed's `optimizer` ask for this norm. ZeRO 3 and offloaded gradients keep their own: they know no pipeline."""
    if isinstance(optimizer, BF16_Optimizer):
        assert hasattr(deepspeed.runtime.bf16_optimizer, "get_global_norm_of_tensors")

        def of_tensors(input_tensors: Iterable[torch.Tensor], **_: Any) -> torch.Tensor:
            # every data rank has all gradients of its place
            norm = _norm(list(input_tensors), grid.model_group, grid)
            return torch.where(norm.isfinite(), norm, INVALID)

        deepspeed.runtime.bf16_optimizer.get_global_norm_of_tensors = of_tensors
    elif isinstance(optimizer, DeepSpeedZeroOptimizer) and not optimizer.cpu_offload:

        def scaled_global_norm(norm_type: float = 2) -> torch.Tensor:
            # every rank has gradients of its own: a part of those of its place
            norm = _norm(list(_counted_once(optimizer, grid)), dist.group.WORLD, grid)
            return torch.where(norm.isfinite(), norm, torch.inf)

        optimizer.scaled_global_norm = scaled_global_norm


def _counted_once(optimizer: DeepSpeedZeroOptimizer, grid: Grid) -> Iterable[torch.Tensor]:
    for index in range(len(optimizer.bit16_groups)):
        gradients = (g for g in optimizer.averaged_gradients[index] if not getattr(g, "_zero_padding", False))
        for gradient, parameter in zip(gradients, optimizer.params_in_partition[index], strict=False):
            replicated = not is_model_parallel_parameter(parameter) and grid.tensor_rank > 0
            if not replicated and not getattr(parameter, "ds_pipe_replicated", False):
                yield gradient


def _norm(gradients: list[torch.Tensor], group: dist.ProcessGroup | None, grid: Grid) -> torch.Tensor:
    square = torch.zeros((), dtype=torch.float64, device=grid.device)
    if gradients:
        norms = torch._foreach_norm([gradient.detach() for gradient in gradients], 2, torch.float64)
        square += torch.stack(norms).square().sum()
    if group is not None and dist.get_world_size(group) > 1:
        with CLOCK.collective("all_reduce", num_bytes(square), group):
            dist.all_reduce(square, group=group)
    return square.sqrt().float()


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
