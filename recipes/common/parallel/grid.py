"""Which rank holds what, and the process groups that follow.

Ranks are numbered as DeepSpeed's PipeModelDataParallelTopology numbers them, (pipeline, data, tensor) with tensor innermost,
so that tensor-parallel traffic stays inside a node and pipeline stages are the furthest apart:

    rank = (pipeline_rank * data + data_rank) * tensor + tensor_rank
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from recipes.common.config.placement import ONE_PASS, Coordinates, coordinates
from recipes.common.recipe import Layout


@dataclass(frozen=True, kw_only=True)
class Grid(Coordinates):
    """Coordinates with this rank's process groups. A group of one rank is None: nothing is ever sent in it."""

    device: torch.device
    tensor_group: dist.ProcessGroup | None
    data_group: dist.ProcessGroup | None
    model_group: dist.ProcessGroup | None  # pipeline x tensor: the ranks that together hold one replica
    pipeline_group: dist.ProcessGroup | None
    tie_group: dist.ProcessGroup | None  # the ranks of embedding and head at one (data, tensor) place: they share tied weights
    kv_group: dist.ProcessGroup | None  # the tensor ranks that share one key/value head, when heads < tensor
    # pipeline_group twice more, for what goes to later ranks and what goes to earlier ones: messages between two ranks arrive in
    # the order sent within a group, and neither direction waits for the other. None with "1f1b", which DeepSpeed sends for
    down_group: dist.ProcessGroup | None = None
    up_group: dist.ProcessGroup | None = None

    def rank_of_stage(self, stage: int) -> int:
        """The rank at this rank's (data, tensor) place in another stage."""
        return (stage * self.data + self.data_rank) * self.tensor + self.tensor_rank


def one_process(device: torch.device | None = None) -> Grid:
    """The grid of a run on one rank, for tools and tests: no process group is needed."""
    place = coordinates(0, 1, Layout())
    groups = ("tensor_group", "data_group", "model_group", "pipeline_group", "tie_group", "kv_group")
    return Grid(**vars(place), device=device or torch.device("cpu"), **dict.fromkeys(groups))


def build_grid(layout: Layout, device: torch.device, kv_share: int = 1) -> Grid:
    """Create every group, on every rank, in one order (torch.distributed demands it).

    `kv_share` is the number of neighbouring tensor ranks that share one key/value head (1: none do).
    """
    place = coordinates(dist.get_rank(), dist.get_world_size(), layout)
    ranks = torch.arange(dist.get_world_size()).view(place.pipeline, place.data, place.tensor)
    by_tensor = ranks.reshape(-1, place.tensor)
    by_data = ranks.permute(0, 2, 1).reshape(-1, place.data)
    by_model = ranks.permute(1, 0, 2).reshape(place.data, -1)
    by_pipeline = ranks.permute(1, 2, 0).reshape(-1, place.pipeline)
    by_tie = by_pipeline[:, [0, -1]] if place.pipeline > 1 and not place.folded else by_pipeline[:, :1]
    return Grid(
        **vars(place),
        device=device,
        tensor_group=_group_of(place.rank, by_tensor),
        data_group=_group_of(place.rank, by_data),
        model_group=_group_of(place.rank, by_model),
        pipeline_group=_group_of(place.rank, by_pipeline),
        tie_group=_group_of(place.rank, by_tie),
        kv_group=_group_of(place.rank, by_tensor.reshape(-1, kv_share)),
        down_group=_group_of(place.rank, by_pipeline) if layout.pipeline_schedule != ONE_PASS else None,
        up_group=_group_of(place.rank, by_pipeline) if layout.pipeline_schedule != ONE_PASS else None,
    )


def _group_of(rank: int, rows: torch.Tensor) -> dist.ProcessGroup | None:
    """The group of the row that holds `rank`; rows of one rank make no group."""
    if rows.shape[1] == 1:
        return None
    mine = None
    for row in rows.tolist():
        group = dist.new_group(row)
        if rank in row:
            mine = group
    return mine


class Mpu:
    """What DeepSpeed's engine asks of a Megatron-style `mpu` when there is no pipeline (it counts norms over it)."""

    def __init__(self, grid: Grid) -> None:
        assert grid.pipeline == 1
        self._grid = grid
        # DeepSpeed reduces over these even when they hold one rank
        self._tensor = grid.tensor_group or self._alone()
        self._data = grid.data_group or self._alone()

    def _alone(self) -> dist.ProcessGroup:
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
