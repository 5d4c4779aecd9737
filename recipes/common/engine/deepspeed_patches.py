"""Replaces functions of DeepSpeed: all of them here, by what the modules named in this table define.

In the process, where DeepSpeed allows no other way. Several trainers may share one: each replacement finds its engine's state in
its arguments, and without any does what DeepSpeed's own does.
    deepspeed.ops.__compatible_ops__             empty: no compiler is looked for at start
    torch.compile, while Muon is imported        off: Muon is unused
    module.PipelineParallelGrid, while a pipeline is built    deepspeed_groups.PipelineGroups: our groups, not a second set
    engine._configure_distributed_model, while one is built   the same, and whether it has experts: it knows only DeepSpeed's own
    deepspeed.comm.comm.cdb                      deepspeed_timers.TimedBackend: collectives on the clock
    bf16_optimizer.get_global_norm_of_tensors    gradient_norm: the exact norm and the gate
    stage_1_and_2.all_gather_dp_groups           gradient_path: updated weights are gathered beside the next forward pass
    bf16_optimizer.get_norm_with_moe_layers      nothing: that norm has the experts in it
On one engine:
    optimizer.scaled_global_norm, optimizer._get_norm_groups    gradient_norm: the same for ZeRO 1 and 2, and for ZeRO 3
    engine._INSTRUCTION_MAP                      deepspeed_timers: instructions on the clock; executor: the passes of a step
    engine._train_schedule                       executor: the passes of a step, then DeepSpeed's reductions and its step
    engine._aggregate_total_loss                 nothing: the trainer sums losses itself
    engine.timers                                nothing: a pipeline engine's keeps two CUDA events a step for ever
    engine.buffered_allreduce_fallback, and four functions of each optimizer of ZeRO 1
                                                 gradient_path: how gradients are added and reduced, and bf16 weights gathered
"""

from __future__ import annotations

import contextlib
import importlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.comm import comm
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime import utils as deepspeed_utils
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe import module as pipe_module
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.runtime.utils import all_gather_dp_groups, get_global_norm_of_tensors, get_norm_with_moe_layers
from deepspeed.runtime.zero import stage_1_and_2
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils.timer import NoopTimer

from recipes.common.engine.deepspeed_groups import PipelineGroups
from recipes.common.engine.deepspeed_timers import TimedBackend, timed_instructions
from recipes.common.engine.gradient_norm import NormGate, norm_of_partitions, norm_of_parts
from recipes.common.engine.gradient_path import GatheredFlats, own_gradients
from recipes.common.parallel.gradient_buckets import GradientBuckets
from recipes.common.parallel.grid import Grid
from recipes.common.pipeline.executor import OneStep, PipelineExecutor, RunPasses

INVALID = -1.0  # DeepSpeed's mark for a norm that is not a number

assert hasattr(pipe_module, "PipelineParallelGrid"), "DeepSpeed's pipeline makes its groups in another way"
assert hasattr(bf16_optimizer, "get_global_norm_of_tensors"), "DeepSpeed's bf16 optimizer takes its norm in another way"
assert hasattr(stage_1_and_2, "all_gather_dp_groups"), "DeepSpeed's ZeRO hands out weights in another way"
assert hasattr(DeepSpeedEngine, "_configure_distributed_model"), "DeepSpeed looks for layers of experts in another way"


def patch_start() -> None:
    """Skip two things that cost seconds at a start and that training does not use. Call it before DeepSpeed is initialised."""
    # on CPU DeepSpeed would look for compilers and build an extension (25 s, and a stale lock hangs the next run)
    deepspeed.ops.__compatible_ops__ = defaultdict(bool)  # before 0.19 the one that it looks for was read by its name
    # ZeRO imports DeepSpeed's Muon optimizer, which compiles three functions as it is imported: 2.4 s a rank
    compile_, torch.compile = torch.compile, lambda function=None, **_: function or (lambda decorated: decorated)
    try:
        with contextlib.suppress(ImportError):  # it came with DeepSpeed 0.19
            importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        torch.compile = compile_


@contextlib.contextmanager
def share_groups(grid: Grid) -> Iterator[None]:
    """Let a PipelineModule that is built meanwhile use our groups."""

    def ours(process_group: Any, topology: PipeModelDataParallelTopology) -> PipelineGroups:
        return PipelineGroups(grid, topology)

    theirs, pipe_module.PipelineParallelGrid = pipe_module.PipelineParallelGrid, ours
    try:
        yield
    finally:
        pipe_module.PipelineParallelGrid = theirs


@contextlib.contextmanager
def with_experts(has_banks: bool) -> Iterator[None]:
    """Let an engine that is built meanwhile look for groups of experts among its optimizer's, where this stage has banks."""
    theirs = DeepSpeedEngine._configure_distributed_model

    def ours(engine: DeepSpeedEngine, model: torch.nn.Module) -> None:
        theirs(engine, model)
        engine.has_moe_layers = has_banks

    DeepSpeedEngine._configure_distributed_model = ours
    try:
        yield
    finally:
        DeepSpeedEngine._configure_distributed_model = theirs


def patch_engine(
    engine: DeepSpeedEngine, grid: Grid, executor: PipelineExecutor | None, late: Collection[torch.nn.Parameter]
) -> tuple[NormGate, GradientBuckets | None]:
    """Replace the functions of the table above for this engine. Returns the gate of its steps, and its buckets, if it has any.

    late: see GradientBuckets.
    """
    gate = NormGate(grid.device)
    stage_1_and_2.all_gather_dp_groups = _gather_weights
    _patch_norm(engine.optimizer, grid, gate)
    if not isinstance(comm.cdb, TimedBackend):
        comm.cdb = TimedBackend(comm.cdb)
    buckets = own_gradients(engine, grid, late)
    if executor is not None:
        executor.buckets = buckets
        engine._aggregate_total_loss = lambda: torch.zeros(())
        engine.timers = NoopTimer()
        # on the instance, because `deepspeed.initialize` chooses the engine's class
        timed = timed_instructions(engine._INSTRUCTION_MAP)
        engine._INSTRUCTION_MAP = engine._INSTRUCTION_MAP | timed | {RunPasses: lambda engine: executor.train()}
        engine._train_schedule = lambda: OneStep(engine.micro_batches, engine.num_stages, engine.stage_id)
    return gate, buckets


def _patch_norm(optimizer: Any, grid: Grid, gate: NormGate) -> None:
    """Give `optimizer` the exact norm, and an invalid one for steps that the gate refuses.

    ZeRO 3 and offloaded gradients keep DeepSpeed's norm (they know no pipeline); the gate holds for them too.
    """
    if isinstance(optimizer, BF16_Optimizer):
        # the engine's own mpu is all that identifies it in this function's arguments
        def exact_norm(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
            return gate.checked(norm_of_parts(list(gradients), grid), INVALID)

        optimizer.mpu.trifold_norm = exact_norm
        bf16_optimizer.get_global_norm_of_tensors = _bf16_norm
        bf16_optimizer.get_norm_with_moe_layers = _norm_with_experts
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        theirs = optimizer.scaled_global_norm

        def scaled_global_norm(norm_type: float = 2) -> torch.Tensor:
            return gate.checked(theirs(norm_type) if optimizer.cpu_offload else norm_of_partitions(optimizer, grid), torch.inf)

        optimizer.scaled_global_norm = scaled_global_norm
    elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        norm_groups = optimizer._get_norm_groups

        def gated_groups() -> list[torch.Tensor]:
            norms = norm_groups()
            norm = deepspeed_utils.combine_grad_norm_groups(norms)
            return [torch.full_like(norm, torch.inf)] if gate.refuses(norm) else norms

        optimizer._get_norm_groups = gated_groups


def _norm_with_experts(norm: torch.Tensor, mpu: Any, **options: Any) -> torch.Tensor:
    return norm if hasattr(mpu, "trifold_norm") else get_norm_with_moe_layers(norm, mpu, **options)


def _bf16_norm(input_tensors: Iterable[torch.Tensor], norm_type: float = 2, mpu: Any = None, **options: Any) -> torch.Tensor:
    own = getattr(mpu, "trifold_norm", None)  # None for an engine that is not a trainer's
    return get_global_norm_of_tensors(input_tensors, norm_type, mpu, **options) if own is None else own(input_tensors)


def _gather_weights(groups_flat: list[torch.Tensor], *arguments: Any, **options: Any) -> None:
    if isinstance(groups_flat, GatheredFlats):
        groups_flat.gathers.start()
    else:
        all_gather_dp_groups(groups_flat, *arguments, **options)
