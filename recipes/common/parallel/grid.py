"""Builds the process groups of a layout.

Ranks are numbered as DeepSpeed's PipeModelDataParallelTopology numbers them, (pipeline, data, tensor) with tensor innermost,
so that tensor-parallel traffic stays inside a node and pipeline stages are the furthest apart:

    rank = (pipeline_rank * data + data_rank) * tensor + tensor_rank

Context ranks are neighbouring data ranks, data_rank = reader * context + context_rank, and of those neighbours divide heads.
Expert ranks are neighbouring data ranks too; the two splits need not match.

A rank makes only groups that it is in, the same few at any world size, and DeepSpeed is given them instead of making its own
(recipes.common.engine.deepspeed_groups): 9 calls a rank for 405B on 8,192, where a call for every row of ranks takes 3,969.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist

from recipes.common.config.placement import Coordinates, coordinates
from recipes.common.recipe import Layout
from recipes.common.runtime.step_clock import CONTEXT, EXPERT


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
    # arrive in the order sent, and neither direction waits for the other
    down_group: dist.ProcessGroup | None = None
    up_group: dist.ProcessGroup | None = None
    expert_group: dist.ProcessGroup | None = None  # the data ranks that share experts: tokens travel between them
    expert_data_group: dist.ProcessGroup | None = None  # the data ranks with the same experts, if there are others
    alone_group: dist.ProcessGroup | None = None  # this rank's own, for DeepSpeed, which reduces over one rank as well

    def timed_groups(self) -> dict[dist.ProcessGroup, str]:
        """Return the groups whose time the clock counts apart from that of other data ranks, with their part of a step."""
        parts = {self.head_group: CONTEXT, self.span_group: CONTEXT, self.expert_group: EXPERT}
        return {group: part for group, part in parts.items() if group is not None}

    def rank_of_stage(self, stage: int) -> int:
        """Return the rank of another stage that has this rank's data and tensor coordinates."""
        return (stage * self.data + self.data_rank) * self.tensor + self.tensor_rank


def one_process(device: torch.device | None = None) -> Grid:
    """Return the grid of a run on one rank, for tools and tests: no process group is needed."""
    own = coordinates(0, 1, Layout())
    groups = ("tensor_group", "data_group", "model_group", "pipeline_group", "tie_group", "kv_group")
    return Grid(**vars(own), device=device or torch.device("cpu"), **dict.fromkeys(groups))


# torch names a group by its ranks and by how many groups the rank has made before, and the members have to agree on the name:
# every rank makes equally many. Where others make their tie_group, a stage between the ends makes this one, of itself
_UNUSED = "unused"
# their messages must not wait for those of another group of the same ranks; the clock counts context ranks' groups by themselves
_UNSHARED = ("head_group", "span_group", "expert_group", "down_group", "up_group", _UNUSED)


def rank_groups(own: Coordinates, ranks_per_kv_head: int = 1, head_ranks: int = 1) -> dict[str, tuple[int, ...]]:
    """Return Grid's field -> ranks for every group that a rank is in, in the order in which they are made.

    ranks_per_kv_head: neighbouring tensor ranks that share one key/value head (1: none do). head_ranks: neighbouring context
    ranks that divide heads.
    """

    def ranks(pipeline: Iterable[int] | int, data: Iterable[int] | int, tensor: Iterable[int] | int) -> tuple[int, ...]:
        axes = ([axis] if isinstance(axis, int) else axis for axis in (pipeline, data, tensor))
        return tuple((p * own.data + d) * own.tensor + t for p, d, t in itertools.product(*axes))

    def block(place: int, size: int) -> range:
        return range(place - place % size, place - place % size + size)

    stage, data, tensor = own.pipeline_rank, own.data_rank, own.tensor_rank
    pipeline = ranks(range(own.pipeline), data, tensor)
    slices = block(data, own.context)
    ends = sorted({0, own.pipeline - 1})
    groups = {
        "tensor_group": ranks(stage, data, range(own.tensor)),
        "data_group": ranks(stage, range(own.data), tensor),
        "pipeline_group": pipeline,
        "model_group": ranks(range(own.pipeline), data, range(own.tensor)),
        "kv_group": ranks(stage, data, block(tensor, ranks_per_kv_head)),
        "head_group": ranks(stage, block(data, head_ranks), tensor),
        "span_group": ranks(stage, slices[own.context_rank % head_ranks :: head_ranks], tensor),
        "expert_group": ranks(stage, block(data, own.expert), tensor),
        "expert_data_group": ranks(stage, range(data % own.expert, own.data, own.expert), tensor) if own.expert > 1 else (),
        "down_group": pipeline,
        "up_group": pipeline,
        "tie_group": ranks(ends, data, tensor) if stage in ends and not own.folded else (),
    }
    alone = {"alone_group": (own.rank,)} if 1 in (own.tensor, own.data, own.data // own.expert) else {}
    unused = {_UNUSED: (own.rank,)} if stage not in ends and not own.folded else {}
    return alone | {name: members for name, members in groups.items() if len(members) > 1} | unused


def build_grid(layout: Layout, device: torch.device, ranks_per_kv_head: int = 1, head_ranks: int = 1) -> Grid:
    """Create this rank's groups, as `rank_groups` lists them. Every rank must call it."""
    own = coordinates(dist.get_rank(), dist.get_world_size(), layout)
    groups = _make_groups(rank_groups(own, ranks_per_kv_head, head_ranks))
    names = [field.name for field in fields(Grid) if field.name.endswith("_group")]
    return Grid(**vars(own), device=device, **{name: groups.get(name) for name in names})


def _make_groups(wanted: dict[str, tuple[int, ...]]) -> dict[str, dist.ProcessGroup]:
    """Create the groups of ranks that are given by name; some of the same ranks are one."""
    made: dict[tuple[int, ...], dist.ProcessGroup] = {}
    found = {}
    for name, ranks in wanted.items():
        if name in _UNSHARED or ranks not in made:
            found[name] = dist.new_group(list(ranks), use_local_synchronization=True)
        else:
            found[name] = made[ranks]
        if name not in _UNSHARED:
            made[ranks] = found[name]
    return found


def router_ranks(own: Coordinates, *, stages: bool, readers: bool) -> tuple[int, ...]:
    """Return the ranks that share the counts of a router loss: the context ranks, with all `stages`, with all `readers`."""
    pipeline = range(own.pipeline) if stages else [own.pipeline_rank]
    first = own.data_rank - own.context_rank
    data = range(own.data) if readers else range(first, first + own.context)
    return tuple((p * own.data + d) * own.tensor + own.tensor_rank for p in pipeline for d in data)


def make_router_group(grid: Grid, *, stages: bool, readers: bool) -> dist.ProcessGroup | None:
    """Create the group of `router_ranks`, and exchange a first message in it; None for one rank. Every rank must call it.

    No other messages may use it: its sums wait beside those of the pipeline.
    """
    ranks = router_ranks(grid, stages=stages, readers=readers)
    if len(ranks) == 1:
        return None
    group = dist.new_group(list(ranks), use_local_synchronization=True)
    dist.all_reduce(torch.zeros(1, device=grid.device), group=group)
    return group
