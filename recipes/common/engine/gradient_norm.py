"""Computes the gradient norm of the whole model, to the same last bit in every layout, and judges whether it is too high.

DeepSpeed rounds each rank's sum of squares to fp32 before it adds up ranks, so the norm, and with clipping every weight, depends
in its last bits on which rank holds what; and it asks four groups one after another. Here squares are added up in fp64 on all
ranks at once and rounded at the end.

DeepSpeed skips a step whose norm is invalid, so a norm that the gate refuses is given to it as an invalid one. It gets the norm
on the host: it asks it several questions, each of which would wait for the device, and computes with it in fp32 either way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from recipes.common.parallel.grid import Grid
from recipes.common.runtime.step_clock import CLOCK, num_bytes

_IN_CACHE = 1 << 17  # elements that a CPU widens at a time: 1 MiB of fp64


def norm_of_partitions(optimizer: DeepSpeedZeroOptimizer, grid: Grid) -> torch.Tensor:
    """Return the norm where data ranks have different partitions of the gradients (ZeRO)."""
    return norm_of_parts(list(_counted_once(optimizer, grid)), grid)


def _counted_once(optimizer: DeepSpeedZeroOptimizer, grid: Grid) -> Iterable[torch.Tensor]:
    for index in range(len(optimizer.bit16_groups)):
        gradients = (g for g in optimizer.averaged_gradients[index] if not getattr(g, "_zero_padding", False))
        for gradient, parameter in zip(gradients, optimizer.params_in_partition[index], strict=False):
            replicated = not is_model_parallel_parameter(parameter) and grid.tensor_rank > 0
            if not replicated and not getattr(parameter, "ds_pipe_replicated", False):
                yield gradient


def norm_of_parts(gradients: list[torch.Tensor], grid: Grid) -> torch.Tensor:
    """Return the norm of the whole model's gradient, of which each rank counts these parts."""
    square = torch.zeros((), dtype=torch.float64, device=grid.device)
    if gradients and grid.device.type == "cpu":
        wide = torch.empty(_IN_CACHE, dtype=torch.float64)
        for part in (part for gradient in gradients for part in gradient.detach().flatten().split(_IN_CACHE)):
            widened = wide[: part.numel()].copy_(part)
            square += torch.dot(widened, widened)
    elif gradients:
        norms = torch._foreach_norm([gradient.detach() for gradient in gradients], 2, torch.float64)
        square += torch.stack(norms).square().sum()
    if dist.get_world_size() > 1:
        with CLOCK.collective("all_reduce", num_bytes(square), None):
            dist.all_reduce(square)
    return square.sqrt().float()


class NormGate:
    """Decides for one engine, on all ranks alike, whether a step's gradient norm is over a ceiling."""

    def __init__(self, device: torch.device) -> None:
        self.refused_norm: float | None = None  # of the last step, in the gradients' own units; None where it passed
        self._device, self._ceiling, self._scale = device, math.inf, 1.0

    def open(self, ceiling: float, loss_scale: float) -> None:
        """Set the ceiling of the next step, in the gradients' own units, not the scaled ones."""
        self.refused_norm, self._ceiling, self._scale = None, ceiling, loss_scale

    def checked(self, norm: torch.Tensor, invalid: float) -> torch.Tensor:
        """Return the scaled `norm`, or `invalid` where it is not finite or is refused, on the host. Waits once for the device."""
        norm, refused = self._read(norm)
        return torch.full_like(norm, invalid) if refused else torch.where(norm.isfinite(), norm, invalid)

    def refuses(self, norm: torch.Tensor) -> bool:
        """Judge a step by its scaled norm; one that is not finite is not refused. Collective under a finite ceiling."""
        return self._ceiling < math.inf and self._read(norm)[1]

    def _read(self, norm: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Return the norm on the host, and whether it is refused."""
        if self._ceiling == math.inf:
            return norm.cpu(), False
        # groups of ranks sum in orders of their own: on the ceiling itself the last bit must not decide differently
        high = (norm.isfinite() & (norm.double() > self._ceiling * self._scale)).double().to(self._device)
        if dist.get_world_size() > 1:
            dist.all_reduce(high, op=dist.ReduceOp.MAX)
        scaled, refused = torch.stack([norm.double().to(self._device), high]).cpu().unbind()
        if refused:
            self.refused_norm = float(scaled) / self._scale
        return scaled.to(norm.dtype), bool(refused)
