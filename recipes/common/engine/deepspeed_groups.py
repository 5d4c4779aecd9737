"""Gives DeepSpeed the process groups of our grid, with a pipeline and without: it makes none of its own for them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from deepspeed.utils import groups

from recipes.common.parallel.grid import Grid


class PipelineGroups(PipelineParallelGrid):
    """What a PipelineModule asks of its grid. DeepSpeed's own makes a group for every row of ranks, on every rank."""

    def __init__(self, grid: Grid, topology: PipeModelDataParallelTopology) -> None:
        """Set what DeepSpeed's constructor sets, which is not called."""
        self._topo = topology
        self.global_rank, self.world_size = grid.rank, grid.pipeline * grid.data * grid.tensor
        self.pipe_parallel_size, self.data_parallel_size = grid.pipeline, grid.data
        self.model_parallel_size = self.slice_parallel_size = grid.tensor
        self.stage_id, self.data_parallel_id = grid.pipeline_rank, grid.data_rank
        # in DeepSpeed's order of layers: its own passes are not run
        self.is_first_stage, self.is_last_stage = self.stage_id == 0, self.stage_id == grid.pipeline - 1
        self.p2p_groups: list[list[int]] = []  # of torch before 1.8
        self.ds_model_proc_group = grid.model_group
        self.ds_model_world_size = grid.pipeline * grid.tensor
        self.ds_model_rank = grid.pipeline_rank * grid.tensor + grid.tensor_rank
        self.dp_proc_group, self.dp_group = _group_and_ranks(grid.data_group or grid.alone_group)
        self.pp_proc_group, self.pp_group = _group_and_ranks(grid.pipeline_group)
        self.slice_proc_group, self.slice_group = _group_and_ranks(grid.tensor_group or grid.alone_group)


def _group_and_ranks(group: dist.ProcessGroup) -> tuple[dist.ProcessGroup, list[int]]:
    return group, dist.get_process_group_ranks(group)


class Mpu:
    """Gives DeepSpeed's engine, without a pipeline, the groups that it asks of a Megatron-style `mpu` (to sum norms)."""

    def __init__(self, grid: Grid) -> None:
        assert grid.pipeline == 1
        self._grid = grid
        # DeepSpeed reduces over these groups even when they have one rank
        self._tensor = grid.tensor_group or grid.alone_group
        self._data = grid.data_group or grid.alone_group

    def get_data_parallel_rank(self) -> int:
        return self._grid.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self._grid.data

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data

    def get_model_parallel_rank(self) -> int:
        return self._grid.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self._grid.tensor

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._tensor

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group


def name_expert_groups(grid: Grid, banks: Iterable[torch.nn.Parameter]) -> str:
    """Tell DeepSpeed which data ranks have the same experts. Returns its name of them.

    Banks of experts are marked as its own: it takes the mean of their gradients over all data ranks, of which each expert rank
    has summed a part, and partitions their optimizer states over those of the same experts.
    """
    name = f"experts_{len(groups._EXPERT_DATA_PARALLEL_GROUP)}"  # a process may build one trainer after another
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = grid.expert_data_group or grid.alone_group
    groups._EXPERT_PARALLEL_GROUP[name] = grid.expert_group
    for parameter in banks:
        parameter.allreduce, parameter.group_name = False, name
    return name
