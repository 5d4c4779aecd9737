"""Builds the process groups of a layout.

Ranks are numbered as DeepSpeed's PipeModelDataParallelTopology numbers them, (pipeline, data, tensor) with tensor innermost,
so that tensor-parallel traffic stays inside a node and pipeline stages are the furthest apart:

    rank = (pipeline_rank * data + data_rank) * tensor + tensor_rank

Context ranks are neighbouring data ranks, data_rank = reader * context + context_rank, and of those neighbours divide heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from recipes.common.config.placement import ONE_PASS, Coordinates, coordinates
from recipes.common.recipe import Layout


@dataclass(frozen=True, kw_only=True)
class Grid(Coordinates):
    """A rank's coordinates and process groups. A group of one rank is None: nothing is ever sent in it."""

    device: torch.device
    tensor_group: dist.ProcessGroup | None
    data_group: dist.ProcessGroup | None
    model_group: dist.ProcessGroup | None  # pipeline x tensor: the ranks that together hold one replica
    pipeline_group: dist.ProcessGroup | None
    tie_group: dist.ProcessGroup | None  # the ranks of embedding and head in a pipeline group: they share tied weights
    kv_group: dist.ProcessGroup | None  # the tensor ranks that share one key/value head, when heads < tensor
    head_group: dist.ProcessGroup | None = None  # the context ranks that divide heads, for the slices that they hold together
    span_group: dist.ProcessGroup | None = None  # one context rank of each head_group, with the same heads
    # pipeline_group's ranks again, one group for messages to later ranks and one for those to earlier ranks: within a group they
    # arrive in the order sent, and neither direction waits for the other. None with "1f1b", whose messages DeepSpeed sends
    down_group: dist.ProcessGroup | None = None
    up_group: dist.ProcessGroup | None = None

    def rank_of_stage(self, stage: int) -> int:
        """Return the rank of another stage that has this rank's data and tensor coordinates."""
        return (stage * self.data + self.data_rank) * self.tensor + self.tensor_rank


def one_process(device: torch.device | None = None) -> Grid:
    """Return the grid of a run on one rank, for tools and tests: no process group is needed."""
    own = coordinates(0, 1, Layout())
    groups = ("tensor_group", "data_group", "model_group", "pipeline_group", "tie_group", "kv_group")
    return Grid(**vars(own), device=device or torch.device("cpu"), **dict.fromkeys(groups))


def build_grid(layout: Layout, device: torch.device, ranks_per_kv_head: int = 1, head_ranks: int = 1) -> Grid:
    """Create every group, on every rank, in one order (torch.distributed demands it).

    ranks_per_kv_head: neighbouring tensor ranks that share one key/value head (1: none do). head_ranks: neighbouring context
    ranks that divide heads.
    """
    own = coordinates(dist.get_rank(), dist.get_world_size(), layout)
    ranks = torch.arange(dist.get_world_size()).view(own.pipeline, own.data, own.tensor)
    by_tensor = ranks.reshape(-1, own.tensor)
    by_data = ranks.permute(0, 2, 1).reshape(-1, own.data)
    by_model = ranks.permute(1, 0, 2).reshape(own.data, -1)
    by_pipeline = ranks.permute(1, 2, 0).reshape(-1, own.pipeline)
    by_heads = by_data.reshape(-1, head_ranks)
    by_span = by_data.reshape(-1, own.context // head_ranks, head_ranks).transpose(1, 2).flatten(0, 1)
    by_tie = by_pipeline[:, [0, -1]] if own.pipeline > 1 and not own.folded else by_pipeline[:, :1]
    return Grid(
        **vars(own),
        device=device,
        tensor_group=_group_of(own.rank, by_tensor),
        data_group=_group_of(own.rank, by_data),
        model_group=_group_of(own.rank, by_model),
        pipeline_group=_group_of(own.rank, by_pipeline),
        tie_group=_group_of(own.rank, by_tie),
        kv_group=_group_of(own.rank, by_tensor.reshape(-1, ranks_per_kv_head)),
        head_group=_group_of(own.rank, by_heads),
        span_group=_group_of(own.rank, by_span),
        down_group=_group_of(own.rank, by_pipeline) if layout.pipeline_schedule != ONE_PASS else None,
        up_group=_group_of(own.rank, by_pipeline) if layout.pipeline_schedule != ONE_PASS else None,
    )


def _group_of(rank: int, rows: torch.Tensor) -> dist.ProcessGroup | None:
    """Create a group for every row, and return that of the row with `rank`; rows of one rank make no group."""
    if rows.shape[1] == 1:
        return None
    own = None
    for row in rows.tolist():
        group = dist.new_group(row)
        if rank in row:
            own = group
    return own


class Mpu:
    """Gives DeepSpeed's engine, without a pipeline, the groups that it asks of a Megatron-style `mpu` (to sum norms)."""

    def __init__(self, grid: Grid) -> None:
        assert grid.pipeline == 1
        self._grid = grid
        # DeepSpeed reduces over these groups even when they have one rank
        self._tensor = grid.tensor_group or self._group_of_one()
        self._data = grid.data_group or self._group_of_one()

    def _group_of_one(self) -> dist.ProcessGroup:
        groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        return groups[self._grid.rank]

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
