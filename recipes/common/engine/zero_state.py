"""Finds this rank's part of the training state in DeepSpeed: flat fp32 partitions, and which parameter elements lie in them.

The one module that reads the internals of DeepSpeed's ZeRO optimizers (0.19.3 and later): BF16_Optimizer,
DeepSpeedZeroOptimizer (stages 1 and 2) and DeepSpeedZeroOptimizer_Stage3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from recipes.common.engine.trainer import Trainer

MASTER = "master"  # the fp32 weights; optimizer states keep torch's names (exp_avg, exp_avg_sq, momentum_buffer)


@dataclass(frozen=True)
class Fragment:
    """Elements [start, stop) of a parameter's flattened local shard, at `offset` of a partition's flat tensors."""

    name: str
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Partition:
    """Flat fp32 tensors of one length, by kind, and the fragments in them."""

    states: dict[str, torch.Tensor]
    fragments: tuple[Fragment, ...]


def partitions(trainer: Trainer) -> list[Partition]:
    """Return this rank's whole state. The tensors are DeepSpeed's own: writing to them changes the run (then call `publish`)."""
    flats, fragments = _locate(trainer)
    found = []
    for index, flat in enumerate(flats):
        states = {MASTER: flat.detach()}
        for kind, value in trainer.optimizer.state.get(flat, {}).items():
            if torch.is_tensor(value) and value.shape == flat.shape:
                states[kind] = value
        found.append(Partition(states, tuple(fragments[index])))
    return found


def locate(trainer: Trainer) -> list[tuple[torch.Tensor, list[Fragment]]]:
    """Return (flat fp32 tensor of weights, its fragments) pairs. The tensors are the optimizer's parameters."""
    return list(zip(*_locate(trainer), strict=True))


def optimizer_steps(trainer: Trainer) -> int:
    """Return Adam's own step counter, which corrects its bias; 0 for optimizers without one."""
    for state in trainer.optimizer.state.values():
        if "step" in state:
            return int(state["step"])
    return 0


def create_states(trainer: Trainer, kinds: list[str], steps: int) -> None:
    """Give every partition zeroed optimizer states of these kinds, and a step counter as if `steps` had been taken."""
    for flat in _locate(trainer)[0]:
        state: dict[str, Any] = {kind: torch.zeros_like(flat, requires_grad=False) for kind in kinds}
        if isinstance(trainer.optimizer, torch.optim.AdamW):
            fused = trainer.optimizer.param_groups[0].get("fused")
            state["step"] = torch.tensor(float(steps), device=flat.device if fused else "cpu")
        trainer.optimizer.state[flat] = state


def drop_states(trainer: Trainer) -> None:
    """Delete the optimizer's states: its next step creates new ones."""
    for flat in _locate(trainer)[0]:
        trainer.optimizer.state.pop(flat, None)


def publish(trainer: Trainer) -> None:
    """Copy the fp32 weights into those that the model computes with, on every rank that holds them."""
    zero = trainer.engine.optimizer
    if not isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        zero.update_lp_params()
        return
    for fp32, low in zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True):
        low.data.copy_(fp32.data)
    for index, low in enumerate(zero.fp16_partitioned_groups_flat):
        parts = zero.unflatten(low, zero.fp16_partitioned_groups[index])
        for parameter, part in zip(zero.fp16_partitioned_groups[index], parts, strict=True):
            parameter.data = part.data
    if zero.persistent_parameters:  # small ones that stay whole on every rank
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def scaler_state(trainer: Trainer) -> dict[str, float | int | bool]:
    """Return the plain numbers of fp16's loss scaler; empty in other precisions."""
    if not trainer.engine.fp16_enabled():
        return {}
    scaler = trainer.engine.optimizer.loss_scaler
    return {name: value for name, value in vars(scaler).items() if isinstance(value, bool | int | float)}


def restore_scaler(trainer: Trainer, state: dict[str, float | int | bool]) -> None:
    if trainer.engine.fp16_enabled():
        for name, value in state.items():
            setattr(trainer.engine.optimizer.loss_scaler, name, value)


def _locate(trainer: Trainer) -> tuple[list[torch.Tensor], list[list[Fragment]]]:
    """Return the flat fp32 tensors, and the fragments in each."""
    zero = trainer.engine.optimizer
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        return _locate_stage3(trainer, zero)
    bf16 = isinstance(zero, BF16_Optimizer)
    flats = zero.fp32_groups_flat_partition if bf16 else zero.single_partition_of_fp32_groups
    fragments: list[list[Fragment]] = [[] for _ in flats]
    for name, parameter in trainer.stage.hf_named_parameters():
        mapping = parameter._hp_mapping
        if mapping is not None:  # else all of it is in other data ranks' partitions
            local, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
            fragment = Fragment(name, local.start, local.start + local.numel, flat.start)
            fragments[mapping.param_group_index].append(fragment)
    return list(flats), fragments


def _locate_stage3(trainer: Trainer, zero: DeepSpeedZeroOptimizer_Stage3) -> tuple[list[torch.Tensor], list[list[Fragment]]]:
    flats = list(zero.fp32_partitioned_groups_flat)
    fragments: list[list[Fragment]] = [[] for _ in flats]
    for name, parameter in trainer.stage.hf_named_parameters():
        group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
        start = trainer.grid.data_rank * length
        stop = min(start + length, parameter.ds_numel)
        if start < stop:  # the last ranks of a small parameter hold padding only
            fragments[group].append(Fragment(name, start, stop, offset))
    return flats, fragments
