"""Before the first step every group has worked and every neighbour been heard, in each group that carries messages."""

import pytest
import torch.distributed as dist

from recipes.common.engine.startup import start_distributed
from recipes.common.parallel.first_messages import exchange_first_messages
from recipes.common.parallel.grid import build_grid
from recipes.common.recipe import Layout
from tools.common.forked_ranks import run_ranks


@pytest.mark.parametrize(("pipeline", "chunks"), [(2, 1), (3, 2), (4, 1)])
def test_every_neighbour_is_heard_in_every_group(pipeline, chunks):
    """In those of messages to later ranks and of messages to earlier ones. Chunks that go around make a ring of the stages."""
    found = run_ranks(_exchange, pipeline * 2, Layout(pipeline=pipeline, chunks=chunks))
    for rank, (heard, reduced) in enumerate(found):
        stage, data_rank = divmod(rank, 2)
        neighbours = [stage + step for step in (-1, 1) if 0 <= stage + step < pipeline]
        neighbours = neighbours if chunks == 1 else [(stage + step) % pipeline for step in (-1, 1)]
        assert sorted(heard) == sorted([float(2 * each + data_rank) for each in neighbours] * 2)
        assert reduced[0] == list(range(2 * pipeline))
        assert [2 * stage, 2 * stage + 1] in reduced


def _exchange(layout):
    """What a rank hears, and the groups in which it has summed."""
    grid, reduced, all_reduce = build_grid(layout, start_distributed("cpu")), [], dist.all_reduce

    def recorded(tensor, group=None):
        all_reduce(tensor, group=group)
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        assert tensor.item() == len(ranks)
        reduced.append(ranks)

    dist.all_reduce = recorded
    heard = exchange_first_messages(grid)
    dist.barrier()
    return [int(value) for value in heard], reduced


def test_one_rank_has_nobody_to_hear():
    assert run_ranks(_alone, 1) == [[]]


def _alone():
    return exchange_first_messages(build_grid(Layout(), start_distributed("cpu")))
