"""Builds the parallel baseline: torch's own pipeline schedule, tensor parallelism and data parallelism over the same model.

torch.distributed.pipelining's Schedule1F1B; linears and vocabulary sharded by `parallelize_module` into DTensors, the loss
computed on the shards (`loss_parallel`); DistributedDataParallel. The stages are ours: the partition is not what is measured.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, loss_parallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from recipes.common.engine.startup import start_distributed
from recipes.common.parallel.grid import Grid, build_grid
from recipes.common.parallel.tensor_plans import tensor_plan
from recipes.common.pipeline.stage import Stage, build_stage, plan_model
from tests.bench.step.sides import Step
from tools.common.console import UsageError
from tools.common.parity import Trial, batches, torch_optimizer

_STYLES: dict[str, type[ParallelStyle]] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}


class _Part(nn.Module):
    """One stage's part of the model, before tensor sharding: hidden states in and out, logits on the last stage."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.stage(x)
        return self.stage.causal.get_output_embeddings()(hidden) if self.stage.is_last else hidden


def torch_parallel(trial: Trial) -> Step:
    """Build the baseline on every rank of the trial's layout, its ranks placed as ours are."""
    device = start_distributed(trial.device)
    grid = build_grid(trial.layout, device)
    mesh = init_device_mesh(device.type, (grid.pipeline, grid.data, grid.tensor), mesh_dim_names=("pipeline", "data", "tensor"))
    model = plan_model(trial.model, attention=trial.attention)
    stage = build_stage(model, _without_tensor(grid), seq_len=trial.seq_len, seed=trial.seed, torch_linears=True)
    if grid.tensor > 1:
        _shard_by_tensors(stage, mesh["tensor"])
    part = _Part(stage).to(device).train()
    if grid.data > 1:
        part = DistributedDataParallel(part, process_group=mesh["data"].get_group())
    optimizer = torch_optimizer(trial.optimizer, stage.causal, fused=True)
    mine = batches(trial)[0].split(trial.micro_seqs)[grid.data_rank :: grid.data]
    whole = torch.cat(mine).to(device)
    ids, targets = whole[:, :-1].contiguous(), whole[:, 1:].contiguous()

    def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()) / len(mine)

    group = mesh["pipeline"].get_group()
    run = Schedule1F1B(
        PipelineStage(part, grid.pipeline_rank, grid.pipeline, device, group=group), len(mine), loss_of, scale_grads=False
    )

    def step() -> float:
        losses: list[torch.Tensor] = []
        with loss_parallel() if grid.tensor > 1 else contextlib.nullcontext():
            if grid.is_first_stage:
                run.step(ids)
            elif grid.is_last_stage:
                run.step(target=targets, losses=losses, return_outputs=False)
            else:
                run.step()
        _clip(list(stage.parameters()), trial.optimizer.clip or float("inf"), group)
        optimizer.step()
        optimizer.zero_grad()
        return _mean_loss(losses, grid)

    return step


def _without_tensor(grid: Grid) -> Grid:
    """Return the grid of the same stages without tensor ranks: torch shards them."""
    return replace(grid, tensor=1, tensor_rank=0, tensor_group=None, kv_group=None)


def _shard_by_tensors(stage: Stage, mesh: DeviceMesh) -> None:
    causal, stack, styles = stage.causal, stage.stack, {}
    for name, style in tensor_plan(causal, stack).items():
        if style not in _STYLES:
            raise UsageError(f"torch's tensor parallelism has no {style!r}, which {name} asks for; use a llama")
        styles[name] = _STYLES[style]()
    if stage.is_first:
        styles[stack.embedding] = RowwiseParallel(input_layouts=Replicate())
    if stage.is_last:
        styles[stack.head] = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(causal, mesh, styles)


def _clip(parameters: list[nn.Parameter], clip: float, pipeline: dist.ProcessGroup) -> None:
    """Clip by the norm over all stages. DTensors and plain tensors do not mix in one call."""
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    kinds = [kind for kind in (sharded, [p for p in parameters if not isinstance(p, DTensor)]) if kind]
    norms = [torch.nn.utils.get_total_norm([p.grad for p in kind]) for kind in kinds]
    squares = sum((norm.full_tensor() if isinstance(norm, DTensor) else norm).square() for norm in norms)
    dist.all_reduce(squares, group=pipeline)
    for kind in kinds:
        torch.nn.utils.clip_grads_with_norm_(kind, clip, squares.sqrt())


def _mean_loss(losses: list[torch.Tensor], grid: Grid) -> float:
    """Return the mean over the global batch on the last stage; NaN on others."""
    if not grid.is_last_stage:
        return float("nan")
    total = torch.stack([loss.full_tensor() if isinstance(loss, DTensor) else loss for loss in losses]).sum().detach()
    if grid.data_group is not None:
        dist.all_reduce(total, group=grid.data_group)
    return total.item() / grid.data
