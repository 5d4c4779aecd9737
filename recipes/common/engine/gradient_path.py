"""Gives DeepSpeed's optimizers of ZeRO 1 our way of gradients: into fp32 by the products themselves, and to their owners.

DeepSpeed's own all-reduces whole gradients after the last backward pass, and copies them three times on the way. The optimizer
reads its partition alone, so here each of its groups is a bucket that is reduced to its owners (`parallel.gradient_buckets`); the
norm and clipping touch the partition. Updated weights go back in the order of their use (`parallel.weight_gathers`), also
with ZeRO 2.

Parameters of which each tensor rank computes a part of the gradient (norms under sequence parallelism) are summed over them
afterwards: what a rank owns of them, once a step, in one fp32 message, and not for each parameter and micro batch.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from recipes.common.config.ds_config import sums_gradients_by_step
from recipes.common.engine.optimizers import WholeUnitsAdamW
from recipes.common.model.main_grads import give_main_grad
from recipes.common.parallel.collectives import take_gradient_sums
from recipes.common.parallel.gradient_buckets import Bucket, GradientBuckets, sum_together
from recipes.common.parallel.grid import Grid
from recipes.common.parallel.weight_gathers import Flat, WeightGathers, wait_in_stage
from recipes.common.pipeline.stage import Stage

for _name in ("accumulate_hp_grads_and_remove_lp", "get_grads_for_norm", "clear_hp_grads", "update_lp_params"):
    assert hasattr(BF16_Optimizer, _name), f"DeepSpeed's bf16 optimizer has no {_name}"
for _name in (
    "process_gradients", "fill_grad_accum_attribute", "reduce_gradients", "zero_grad", "_get_preflattened_grad_partition",
    "unscale_and_clip_grads", "_link_all_hp_params",
):  # fmt: skip
    assert hasattr(DeepSpeedZeroOptimizer, _name), f"DeepSpeed's ZeRO optimizer has no {_name}"
assert hasattr(DeepSpeedEngine, "buffered_allreduce_fallback"), "DeepSpeed reduces gradients in another way"


def bucket_elements(ds_config: dict[str, Any], grid: Grid) -> int | None:
    """Return how many elements a bucket should have; None where gradients do not go our way, or there is one data rank."""
    zero = ds_config["zero_optimization"]
    return int(zero.get("reduce_bucket_size", 5e8)) if sums_gradients_by_step(ds_config) and grid.data > 1 else None


def own_gradients(engine: DeepSpeedEngine, grid: Grid, late: Collection[nn.Parameter]) -> GradientBuckets | None:
    """Replace how this engine adds up, reduces and clears gradients, with ZeRO 1.

    late: see GradientBuckets. Returns the buckets, to be told which gradients are a step's last.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, BF16_Optimizer):
        return _own_bf16(engine, grid, late)
    if isinstance(optimizer, DeepSpeedZeroOptimizer) and not optimizer.partition_gradients and not optimizer.cpu_offload:
        moved = optimizer.round_robin_gradients or getattr(optimizer, "parameter_alignment", None)
        hooked = optimizer.contiguous_gradients or optimizer.overlap_comm or optimizer.use_grad_accum_attribute
        return _own_zero1(engine, grid, late) if hooked and not moved else None
    return None


def _own_bf16(engine: DeepSpeedEngine, grid: Grid, late: Collection[nn.Parameter]) -> GradientBuckets:
    optimizer, divisor = engine.optimizer, engine.gradient_predivide_factor()
    factors = {"before": 1.0 / divisor, "after": divisor / grid.data}
    if not engine.postscale_gradients():
        factors = {"before": 1.0 / grid.data, "after": 1.0}
    flats, groups = optimizer.fp32_groups_gradients_flat, optimizer.real_dp_process_group
    buckets = [
        Bucket(flat=flat, own=_own_part(flat, group), group=group, parameters=tuple(parameters), **factors)
        for flat, group, parameters in zip(flats, groups, optimizer.bf16_groups, strict=True)
    ]
    reduced = _in_backward_order(engine, buckets, late)
    counted, own = [part for b in buckets for part in _counted_parts(b, grid)], [bucket.own for bucket in buckets]
    optimizer.accumulate_hp_grads_and_remove_lp = lambda parameter, *place: _add(reduced, parameter)
    optimizer.get_grads_for_norm = lambda for_clipping=False: own if for_clipping else (counted, {})
    optimizer.clear_hp_grads = reduced.clear
    sums = _sums_of(buckets)
    _give_main_grads(reduced, buckets)

    def reduce(*arguments: Any, **options: Any) -> None:
        reduced.finish()
        sum_together(sums)

    engine.buffered_allreduce_fallback = reduce
    return reduced


class _OwnPart(list[torch.Tensor]):
    """This rank's part of a bucket: in pieces, as DeepSpeed takes its norm, and flat, under its name, so that it copies none."""

    def __init__(self, pieces: list[torch.Tensor], flat_partition: torch.Tensor) -> None:
        super().__init__(pieces)
        self.flat_partition = flat_partition


def _own_zero1(engine: DeepSpeedEngine, grid: Grid, late: Collection[nn.Parameter]) -> GradientBuckets:
    """ZeRO's own optimizer, of fp16 and fp32, keeps no flat gradients: it gets some, and after the reduction this rank's part."""
    optimizer = engine.optimizer
    buckets = []
    for whole, group, parameters in zip(
        optimizer.bit16_groups_flat, optimizer.real_dp_process_group, optimizer.bit16_groups, strict=True
    ):
        flat = torch.zeros_like(whole, dtype=torch.float32)
        own = _own_part(flat, group)
        buckets.append(Bucket(flat=flat, own=own, group=group, parameters=tuple(parameters), after=1.0 / grid.data))
    reduced = _in_backward_order(engine, buckets, late)
    pieces = [[part for _, part in _own_pieces(bucket)] for bucket in buckets]
    for bucket, parts in zip(buckets, pieces, strict=True):
        padding = bucket.own[sum(part.numel() for part in parts) :]
        padding._zero_padding = True  # DeepSpeed's mark of what belongs to no parameter
        parts += [padding] if padding.numel() else []

    sums = _sums_of(buckets)
    _give_main_grads(reduced, buckets)

    def reduce(pipeline_parallel: bool = False) -> None:
        reduced.finish()
        sum_together(sums)
        own = (_OwnPart(parts, bucket.own) for parts, bucket in zip(pieces, buckets, strict=True))
        optimizer.averaged_gradients.update(enumerate(own))

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in engine.module.parameters():
            parameter.grad = None
        reduced.clear()

    optimizer.process_gradients = lambda parameter, group: _add(reduced, parameter)
    optimizer.fill_grad_accum_attribute = lambda: None  # the hooks have had all
    optimizer.reduce_gradients, optimizer.zero_grad = reduce, zero_grad
    _own_update(optimizer)
    return reduced


def _own_update(optimizer: DeepSpeedZeroOptimizer) -> None:
    """Let fp32 weights be their own master weights, and a CPU's optimizer scale gradients while they are in its cache."""
    if optimizer.dtype == torch.float32:
        for masters, parts, group in zip(
            optimizer.single_partition_of_fp32_groups,
            optimizer.parallel_partitioned_bit16_groups,
            optimizer.real_dp_process_group,
            strict=True,
        ):
            masters.data = parts[dist.get_rank(group)]
        optimizer._link_all_hp_params()  # DeepSpeed's parameters know their master weights: these, not the ones before
    if isinstance(inner := optimizer.optimizer, WholeUnitsAdamW):
        theirs = optimizer.unscale_and_clip_grads

        def later(gradients: list[torch.Tensor], norm: torch.Tensor) -> None:
            factor = torch.ones(1)
            theirs([factor], norm)
            inner.gradient_factor = factor if factor.item() != 1.0 else None

        optimizer.unscale_and_clip_grads = later


def _add(reduced: GradientBuckets, parameter: nn.Parameter) -> None:
    """Add what autograd has of a gradient, at the end of its turn in a backward pass: of a linear's weight it has nothing."""
    assert not torch.is_grad_enabled(), "not in a backward pass"
    if parameter.grad is not None:
        if reduced.adding(parameter):
            parameter._hp_grad.copy_(parameter.grad)
        else:
            parameter._hp_grad.add_(parameter.grad)
        parameter.grad = None
    reduced.visit(parameter)


def _in_backward_order(engine: DeepSpeedEngine, buckets: list[Bucket], late: Collection[nn.Parameter]) -> GradientBuckets:
    """Return the buckets, from the model's last parameters on, and let each parameter know its gradient in them."""
    place = {parameter: index for index, parameter in enumerate(engine.module.parameters())}
    for bucket in buckets:
        for parameter, gradient in bucket.gradients():
            parameter._hp_grad = gradient  # by this name DeepSpeed sums those of tied weights
    return GradientBuckets(sorted(buckets, key=lambda bucket: -min(place[p] for p in bucket.parameters)), late)


def _give_main_grads(reduced: GradientBuckets, buckets: list[Bucket]) -> None:
    """Let products add to the buckets; not those whose gradients a hook changes before they are added."""
    for parameter in (parameter for bucket in buckets for parameter in bucket.parameters):
        if not parameter._backward_hooks:
            told = partial(reduced.adding, parameter), partial(reduced.added, parameter)
            give_main_grad(parameter, parameter._hp_grad, *told)


def _own_part(flat: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    size = flat.numel() // dist.get_world_size(group)
    return flat.narrow(0, dist.get_rank(group) * size, size)


def _own_pieces(bucket: Bucket) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Return the parameters of which this rank owns gradients, and which part of its own those are."""
    found, offset = [], bucket.flat.storage_offset() - bucket.own.storage_offset()
    for parameter in bucket.parameters:
        start, offset = offset, offset + parameter.numel()
        part = bucket.own[max(start, 0) : max(min(offset, bucket.own.numel()), 0)]
        found += [(parameter, part)] if part.numel() else []
    return found


def _sums_of(buckets: list[Bucket]) -> dict[dist.ProcessGroup, list[torch.Tensor]]:
    """Return what this rank owns of gradients that are summed over other groups too, by group. No backward pass sums them then.

    The tensor ranks' flat gradients lie alike, since their shards have equal shapes: those of one data rank own the same parts.
    """
    sums: dict[dist.ProcessGroup, list[torch.Tensor]] = {}
    for bucket in buckets:
        groups = take_gradient_sums(bucket.parameters)
        for parameter, part in _own_pieces(bucket):
            if parameter in groups:
                sums.setdefault(groups[parameter], []).append(part)
    return sums


def _counted_parts(bucket: Bucket, grid: Grid) -> list[torch.Tensor]:
    """Return the gradients that this rank counts in the norm: of what it owns, what no other rank owns too."""
    found = []
    for parameter, part in _own_pieces(bucket):
        replicated = grid.tensor_rank > 0 and not is_model_parallel_parameter(parameter)
        if not replicated and not getattr(parameter, "ds_pipe_replicated", False):
            found.append(part)
    return found


class GatheredFlats(list[torch.Tensor]):
    """An optimizer's flat weights, and who gathers them in DeepSpeed's place."""

    def __init__(self, flats: list[torch.Tensor], gathers: WeightGathers) -> None:
        super().__init__(flats)
        self.gathers = gathers


def own_gathers(engine: DeepSpeedEngine, stage: Stage) -> WeightGathers | None:
    """Replace how an optimizer of ZeRO 1 or 2 hands out updated weights. Returns what is under way."""
    optimizer = engine.optimizer
    if isinstance(optimizer, BF16_Optimizer):
        flats = _flats(optimizer, optimizer.bf16_groups_flat, optimizer.bf16_partitioned_groups, optimizer.bf16_groups)
        gathers = _in_forward_order(engine, flats)
        _update_before(gathers, optimizer, list(zip(flats, optimizer.fp32_groups_flat_partition, strict=True)))
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        whole, parts = optimizer.bit16_groups_flat, optimizer.parallel_partitioned_bit16_groups
        gathers = _in_forward_order(engine, _flats(optimizer, whole, parts, optimizer.bit16_groups))
        optimizer.bit16_groups_flat = GatheredFlats(whole, gathers)  # by it `deepspeed_patches` knows whose they are
    else:
        return None
    causal, stack = stage.causal, stage.stack
    layers = [causal.get_submodule(f"{stack.layers}.{index}") for index in stage.own_layers]
    before, after = (list(map(causal.get_submodule, names)) for names in (stack.before, stack.after))
    if stage.is_last:
        after.append(causal.get_submodule(stack.head))
    wait_in_stage(gathers, stage, before, layers, after)
    return gathers


def _flats(
    optimizer: BF16_Optimizer | DeepSpeedZeroOptimizer,
    wholes: list[torch.Tensor],
    parts: list[list[torch.Tensor]],
    parameters: list[list[nn.Parameter]],
) -> list[Flat]:
    return [
        Flat(whole=whole, own=its_parts[dist.get_rank(group)], group=group, parameters=tuple(its_parameters))
        for whole, its_parts, group, its_parameters in zip(
            wholes, parts, optimizer.real_dp_process_group, parameters, strict=True
        )
    ]


def _in_forward_order(engine: DeepSpeedEngine, flats: list[Flat]) -> WeightGathers:
    place = {parameter: index for index, parameter in enumerate(engine.module.parameters())}
    return WeightGathers(sorted(flats, key=lambda flat: min(place[p] for p in flat.parameters)))


def _update_before(gathers: WeightGathers, optimizer: BF16_Optimizer, masters: list[tuple[Flat, torch.Tensor]]) -> None:
    @torch.no_grad()
    def update() -> None:
        gathers.wait()
        for flat, master in masters:
            flat.own.copy_(master)
        gathers.start()

    optimizer.update_lp_params = update
