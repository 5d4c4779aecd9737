"""Gives a BF16_Optimizer our way of gradients: into fp32 without a cast of their own, and from there to the rank that owns them.

DeepSpeed's own all-reduces whole gradients after the last backward pass. The optimizer reads its partition alone, so here each of
its groups is a bucket that is reduced to its owners (`parallel.gradient_buckets`); the norm and clipping touch the partition. The
updated weights go back in the order of their use (`parallel.weight_gathers`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.utils import is_model_parallel_parameter
from torch import nn

from recipes.common.config.ds_config import precision, zero_stage
from recipes.common.parallel.gradient_buckets import Bucket, GradientBuckets
from recipes.common.parallel.grid import Grid
from recipes.common.parallel.weight_gathers import Flat, WeightGathers, wait_in_stage
from recipes.common.pipeline.stage import Stage

for _name in ("accumulate_hp_grads_and_remove_lp", "get_grads_for_norm", "clear_hp_grads", "update_lp_params"):
    assert hasattr(BF16_Optimizer, _name), f"DeepSpeed's bf16 optimizer has no {_name}: it treats gradients in another way"
assert hasattr(DeepSpeedEngine, "buffered_allreduce_fallback"), "DeepSpeed reduces gradients in another way"


def bucket_elements(ds_config: dict[str, Any], grid: Grid) -> int | None:
    """Return how many elements a bucket should have; None where this configuration has no BF16_Optimizer, or one data rank."""
    zero = ds_config["zero_optimization"]
    ours = precision(ds_config) == "bf16" and zero_stage(ds_config) == 1 and "offload_optimizer" not in zero
    return int(zero.get("reduce_bucket_size", 5e8)) if ours and grid.data > 1 else None


def own_gradients(engine: DeepSpeedEngine, grid: Grid, late: Collection[nn.Parameter]) -> GradientBuckets:
    """Replace how this engine, whose optimizer is a BF16_Optimizer, adds up, reduces and clears gradients.

    late: see GradientBuckets. Returns the buckets, to be told which gradients are a step's last.
    """
    optimizer = engine.optimizer
    place = {parameter: index for index, parameter in enumerate(engine.module.parameters())}
    buckets = sorted(_buckets(engine, grid), key=lambda bucket: -min(place[parameter] for parameter in bucket.parameters))
    reduced = GradientBuckets(buckets, late)
    counted, partitions = _counted_parts(optimizer, grid), list(optimizer.fp32_groups_gradient_flat_partition)
    for parameters, gradients in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter._hp_grad = gradient  # by this name DeepSpeed sums those of tied weights

    @torch.no_grad()
    def add(parameter: nn.Parameter, group: int, index: int) -> None:
        if parameter.grad is not None:
            parameter._hp_grad.view(parameter.shape).add_(parameter.grad)
            parameter.grad = None
            reduced.added(parameter)

    def gradients_for(for_clipping: bool = False) -> Any:
        return partitions if for_clipping else (counted, {})

    optimizer.accumulate_hp_grads_and_remove_lp, optimizer.get_grads_for_norm = add, gradients_for
    optimizer.clear_hp_grads = reduced.clear
    engine.buffered_allreduce_fallback = lambda *arguments, **options: reduced.finish()
    return reduced


def _buckets(engine: DeepSpeedEngine, grid: Grid) -> list[Bucket]:
    """Return a bucket for each group of the optimizer, averaged as DeepSpeed does: experts, too, over all data ranks."""
    optimizer, divisor = engine.optimizer, engine.gradient_predivide_factor()
    factors = {"before": 1.0 / divisor, "after": divisor / grid.data}
    if not engine.postscale_gradients():
        factors = {"before": 1.0 / grid.data, "after": 1.0}
    tensors = zip(
        optimizer.fp32_groups_gradients_flat,
        optimizer.fp32_groups_gradient_flat_partition,
        optimizer.real_dp_process_group,
        optimizer.bf16_groups,
        strict=True,
    )
    return [Bucket(flat=f, own=own, group=g, parameters=tuple(parameters), **factors) for f, own, g, parameters in tensors]


def _counted_parts(optimizer: BF16_Optimizer, grid: Grid) -> list[torch.Tensor]:
    """Return the parts of gradients that this rank counts in the norm: of what it owns, what no other rank owns too."""
    found = []
    for flat, own, parameters in zip(
        optimizer.fp32_groups_gradients_flat, optimizer.fp32_groups_gradient_flat_partition, optimizer.bf16_groups, strict=True
    ):
        first = own.storage_offset() - flat.storage_offset()
        offset = -first
        for parameter in parameters:
            start, offset = offset, offset + parameter.numel()
            copied = getattr(parameter, "ds_pipe_replicated", False)
            if not copied and (grid.tensor_rank == 0 or is_model_parallel_parameter(parameter)):
                part = own[max(start, 0) : max(min(offset, own.numel()), 0)]
                found += [part] if part.numel() else []
    return found


def own_gathers(engine: DeepSpeedEngine, stage: Stage) -> WeightGathers:
    """Replace how this engine, whose optimizer is a BF16_Optimizer, hands out updated weights. Returns what is under way."""
    optimizer, causal, stack = engine.optimizer, stage.causal, stage.stack
    place = {parameter: index for index, parameter in enumerate(engine.module.parameters())}
    groups = zip(
        optimizer.bf16_groups_flat,
        optimizer.bf16_partitioned_groups,
        optimizer.real_dp_process_group,
        optimizer.bf16_groups,
        optimizer.fp32_groups_flat_partition,
        strict=True,
    )
    flats = []
    for whole, parts, group, parameters, master in groups:
        own = parts[dist.get_rank(group)]
        flats.append((Flat(whole=whole, own=own, group=group, parameters=tuple(parameters)), master))
    gathers = WeightGathers([flat for flat, _ in sorted(flats, key=lambda pair: min(place[p] for p in pair[0].parameters))])

    @torch.no_grad()
    def update() -> None:
        gathers.wait()
        for flat, master in flats:
            flat.own.copy_(master)
        gathers.start()

    optimizer.update_lp_params = update
    layers = [causal.get_submodule(f"{stack.layers}.{index}") for index in stage.own_layers]
    before, after = (list(map(causal.get_submodule, names)) for names in (stack.before, stack.after))
    if stage.is_last:
        after.append(causal.get_submodule(stack.head))
    wait_in_stage(gathers, stage, before, layers, after)
    return gathers
