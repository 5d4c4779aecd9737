"""Ranks lie where DeepSpeed's own topology puts them, and every process group holds the ranks that it names."""

import itertools

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

from recipes.common.config.placement import coordinates
from recipes.common.engine.startup import start_distributed
from recipes.common.parallel.grid import _UNSHARED, build_grid, one_process, rank_groups
from recipes.common.recipe import Layout
from tools.common.forked_ranks import run_ranks

SHAPES = list(itertools.product((1, 2, 3, 4, 8), (1, 2, 3, 4), (1, 2, 5, 8)))  # pipeline, tensor, data


@pytest.mark.parametrize(("pipeline", "tensor", "data"), SHAPES)
def test_coordinates_are_deepspeeds(pipeline, tensor, data):
    topology = PipeModelDataParallelTopology(num_pp=pipeline, num_mp=tensor, num_dp=data)
    for rank in range(pipeline * tensor * data):
        place, theirs = (
            coordinates(rank, pipeline * tensor * data, Layout(pipeline=pipeline, tensor=tensor)),
            topology.get_coord(rank),
        )
        assert (place.pipeline_rank, place.tensor_rank, place.data_rank) == (theirs.pipe, theirs.model, theirs.data)
        assert (place.pipeline, place.tensor, place.data) == (pipeline, tensor, data)
        assert place.is_first_stage == (theirs.pipe == 0)
        assert place.is_last_stage == (theirs.pipe == pipeline - 1)


def test_one_process_is_everything():
    grid = one_process()
    assert grid.is_first_stage and grid.is_last_stage
    assert [value for name, value in vars(grid).items() if name.endswith("_group")] == [None] * 13


@pytest.mark.parametrize(("pipeline", "tensor", "data"), [(2, 2, 2), (1, 4, 2), (3, 1, 2), (4, 2, 1), (1, 1, 2)])
def test_groups_are_deepspeeds(pipeline, tensor, data):
    topology = PipeModelDataParallelTopology(num_pp=pipeline, num_mp=tensor, num_dp=data)
    ranks = run_ranks(_groups, pipeline * tensor * data, Layout(pipeline=pipeline, tensor=tensor))
    axes = {"tensor_group": "model", "data_group": "data", "pipeline_group": "pipe"}
    for rank, groups in enumerate(ranks):
        for name, axis in axes.items():
            row = next((row for row in topology.get_axis_comm_lists(axis) if rank in row), [rank])
            assert groups[name] == (row if len(row) > 1 else None), (rank, name)
        replica = sorted(topology.filter_match(data=topology.get_coord(rank).data))
        assert groups["model_group"] == (replica if len(replica) > 1 else None)
        pipe = groups["pipeline_group"]
        ends = [pipe[0], pipe[-1]] if pipe else []
        assert groups["tie_group"] == (ends if rank in ends else None)
        assert groups["kv_group"] is None
        assert groups["down_group"] == groups["up_group"] == pipe


def test_a_folded_pipeline_ends_where_it_begins():
    """One rank has embedding and head; what goes to later ranks and what goes to earlier ones have groups of their own."""
    layout = Layout(pipeline=3, pipeline_schedule="zero_bubble_v")
    for rank in range(3):
        place = coordinates(rank, 3, layout)
        assert (place.is_first_stage, place.is_last_stage) == (rank == 0, rank == 0)
    for groups in run_ranks(_groups, 3, layout):
        assert groups["tie_group"] is None
        assert groups["pipeline_group"] == groups["down_group"] == groups["up_group"] == [0, 1, 2]


def test_context_ranks_are_neighbouring_data_ranks():
    """8 data ranks of 2 readers; of each reader's 4 ranks, neighbours divide heads, and every second one gathers."""
    found = run_ranks(_context_groups, 8)
    assert [heads for heads, _, _ in found] == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5], [6, 7], [6, 7]]
    assert [span for _, span, _ in found] == [[0, 2], [1, 3], [0, 2], [1, 3], [4, 6], [5, 7], [4, 6], [5, 7]]
    assert [place for _, _, place in found] == [(rank // 4, rank % 4) for rank in range(8)]


def _context_groups():
    grid = build_grid(Layout(context=4), start_distributed("cpu"), head_ranks=2)
    dist.barrier()
    groups = (dist.get_process_group_ranks(group) for group in (grid.head_group, grid.span_group))
    return *groups, (grid.reader, grid.context_rank)


def _groups(layout):
    grid = build_grid(layout, start_distributed("cpu"))
    dist.barrier()  # a rank that leaves while others still meet would take the meeting place with it
    return {name: group and dist.get_process_group_ranks(group) for name, group in vars(grid).items() if name.endswith("_group")}


def test_neighbours_share_a_key_value_head():
    ranks = run_ranks(_kv_groups, 8)
    assert ranks == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5], [6, 7], [6, 7]]


def _kv_groups():
    grid = build_grid(Layout(tensor=4), start_distributed("cpu"), ranks_per_kv_head=2)
    dist.barrier()
    return dist.get_process_group_ranks(grid.kv_group)


def test_a_process_may_build_one_grid_after_another():
    """The members of a group agree on its name, whatever groups only some of them are in: a wrong one would wait for ever."""
    layouts = [Layout(pipeline=3), Layout(pipeline=3, tensor=2), Layout(pipeline=6), Layout(pipeline=2)]
    for sums in run_ranks(_one_after_another, 6, layouts, timeout_seconds=60.0):
        assert sums == [layout.pipeline for layout in layouts]


def _one_after_another(layouts):
    """How many ranks answer in this rank's pipeline group of each layout."""
    device, sums = start_distributed("cpu"), []
    for layout in layouts:
        one = torch.ones(1)
        dist.all_reduce(one, group=build_grid(layout, device).pipeline_group)
        sums.append(int(one))
    dist.barrier()
    return sums


@pytest.mark.parametrize("world", [24, 384])
def test_every_member_makes_the_same_groups_in_the_same_place(world):
    """By name: the ranks of a group, and how many its members have made before."""
    for layout in (Layout(pipeline=4, tensor=2), Layout(pipeline=3, pipeline_schedule="zero_bubble", tensor=4, context=2)):
        made = [list(_calls(coordinates(rank, world, layout), layout)) for rank in range(world)]
        assert len({len(calls) for calls in made}) == 1
        for rank, calls in enumerate(made):
            assert len(calls) <= 12
            for place, members in enumerate(calls):
                assert rank in members
                assert all(made[member][place] == members for member in members)


def _calls(own, layout):
    seen = set()
    for name, members in rank_groups(own, 2 if layout.tensor == 4 else 1).items():
        if name in _UNSHARED or members not in seen:
            yield members
        seen |= set() if name in _UNSHARED else {members}
