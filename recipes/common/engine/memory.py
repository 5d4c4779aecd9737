"""Counts a rank's memory by what it holds: weights, gradients, optimizer states."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from recipes.common.engine.trainer import Trainer


def memory_by_class(trainer: Trainer) -> dict[str, int]:
    """Return the bytes that this rank holds between steps, each storage once; on a GPU also the allocator's peaks.

    weights: those the model computes with. master_weights: fp32 copies that the optimizer updates, if it has any. optimizer: its
    states.
    gradients: buffers that stay between steps (memory within a step is in `step_peak_allocated` on a GPU).
    """
    seen: set[int] = set()
    stage, engine = trainer.stage, trainer.engine
    sizes = {"weights": _bytes([*stage.parameters(), *stage.buffers()], seen)}
    own = trainer.optimizer
    sizes["gradients"] = _bytes(_gradients(stage, engine.optimizer), seen)
    masters = [parameter for group in own.param_groups for parameter in group["params"]]
    sizes["master_weights"] = _bytes(masters, seen)
    sizes["optimizer"] = _bytes(_tensors(own.state.values()), seen)
    if trainer.grid.device.type == "cuda":
        sizes["step_peak_allocated"] = torch.cuda.max_memory_allocated(trainer.grid.device)
        sizes["reserved"] = torch.cuda.memory_reserved(trainer.grid.device)
    return sizes


def _gradients(stage: torch.nn.Module, optimizer: Any) -> Iterator[torch.Tensor]:
    for parameter in stage.parameters():
        yield from _tensors([parameter.grad, getattr(parameter, "grad_accum", None), getattr(parameter, "_hp_grad", None)])
    # DeepSpeed's flat buffers, by the names its ZeRO optimizers give them
    for name in ("fp32_groups_gradients_flat", "averaged_gradients", "ipg_buckets"):
        yield from _tensors([getattr(optimizer, name, None)])


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value.values())
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _bytes(tensors: Iterable[torch.Tensor], seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
