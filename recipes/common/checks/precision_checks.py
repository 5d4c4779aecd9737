"""Checks what `precision` asks for: its value, the DeepSpeed configuration around it, the widths of matrices, this machine."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from transformers import PreTrainedModel

from recipes.common.config.ds_config import ds_config_path, precision
from recipes.common.model.decoder import Stack, find_stack
from recipes.common.model.fp8 import MULTIPLE
from recipes.common.model.fp8_linears import find_fp8_linears
from recipes.common.model.initial_weights import build_empty
from recipes.common.model.sharding import TensorPlan, rank_shard
from recipes.common.parallel.tensor_parallel import plan_tensor_parallel
from recipes.common.recipe import FP8, PRECISIONS, WHOLE, Layout, Recipe

CAPABILITY = (8, 9)  # NVIDIA's Ada: the first whose tensor cores multiply in fp8


def precision_problems(recipe: Recipe, ds_config: dict[str, Any] | None) -> list[str]:
    """Return what in the recipe itself is wrong with its `precision`. ds_config: None where it cannot be read."""
    if recipe.precision is None:
        return []
    if recipe.precision not in PRECISIONS:
        known = ", ".join(map(repr, PRECISIONS))
        return [f"precision={recipe.precision!r} must be one of {known}, or None, for that of {recipe.deepspeed}"]
    if ds_config is not None and (around := precision(ds_config)) != "bf16":
        return [
            f"precision='fp8' with {ds_config_path(recipe.deepspeed)}, which is {around}: what is not multiplied in fp8 must be "
            "bf16; use a bf16 file such as deepspeed='zero1_bf16.json', or precision=None"
        ]
    return []


def fp8_problems(recipe: Recipe, layout: Layout) -> list[str]:
    """Return which matrices cannot be multiplied in fp8, in a recipe that is sound else."""
    if recipe.precision != FP8:
        return []
    causal = build_empty(recipe.model, recipe.attention)
    stack = find_stack(causal)
    plan = plan_tensor_parallel(causal, stack, layout.tensor, whole_experts=layout.experts == WHOLE)
    return shard_problems(causal, stack, plan)


def shard_problems(causal: PreTrainedModel, stack: Stack, plan: TensorPlan) -> list[str]:
    """Check the widths of a tensor rank's shards. causal: the whole model."""
    names = find_fp8_linears(causal, stack)
    if not names:
        return [
            f"precision='fp8': no layer of {type(causal).__name__} has a linear (nn.Linear, widths multiples of {MULTIPLE}) that "
            "could multiply in fp8; use precision=None"
        ]
    uneven = []
    for name in names:
        whole = tuple(causal.get_submodule(name).weight.shape)
        shape = rank_shard(plan.shards.get(f"{name}.weight"), 0, plan.size).shape(whole)
        if any(size % MULTIPLE for size in shape):
            uneven.append(f"{name}.weight {shape[0]} x {shape[1]}")
    if not uneven:
        return []
    more = f" and {len(uneven) - 1} more" if len(uneven) > 1 else ""
    return [
        f"precision='fp8' with tensor={plan.size}: each tensor rank has of {uneven[0]}{more}, and products in fp8 need "
        f"multiples of {MULTIPLE}; use a smaller tensor size, or precision=None"
    ]


def precision_machine_problems(recipe: Recipe) -> list[str]:
    """Return what this machine's GPU lacks to multiply in fp8."""
    if recipe.precision != FP8 or get_accelerator().device_name() != "cuda":
        return []
    return capability_problems(torch.cuda.get_device_name(), torch.cuda.get_device_capability())


def capability_problems(name: str, capability: tuple[int, int]) -> list[str]:
    """Return why a GPU cannot multiply in fp8."""
    if capability >= CAPABILITY:
        return []
    has, needed = (".".join(map(str, each)) for each in (capability, CAPABILITY))
    return [
        f"precision='fp8': {name} has compute capability {has}, and products in fp8 need {needed} (Ada, Hopper and newer); use "
        "such GPUs, or precision=None"
    ]


def precision_lines(recipe: Recipe, causal: PreTrainedModel) -> list[str]:
    """Return a line on what is multiplied in fp8, for the dry run. causal: the whole model, on the meta device."""
    if recipe.precision != FP8:
        return []
    stack = find_stack(causal)
    names = find_fp8_linears(causal, stack)
    kinds = dict.fromkeys(name.rpartition(".")[2] for name in names)
    layers: nn.Module = causal.get_submodule(stack.layers)
    total = sum(p.numel() for p in layers.parameters() if p.ndim > 1)
    share = sum(causal.get_submodule(name).weight.numel() for name in names) / total
    emulated = "" if get_accelerator().device_name() == "cuda" else "; without a GPU emulated, and slower than bf16"
    return [f"fp8 in {', '.join(kinds)}: {100 * share:.1f} % of the layers' matrices; all else in bf16{emulated}"]
