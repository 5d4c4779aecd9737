"""Uses every process group, and every channel between neighbouring stages, once before the first step.

NCCL makes a group's communicator, and the channel of each pair of ranks, when they are first used, and both sides wait for it.
Here all ranks use them in one order: none is made in the middle of a schedule, and what cannot connect hangs or fails here.
"""

from __future__ import annotations

from dataclasses import fields

import torch
import torch.distributed as dist

from recipes.common.parallel.grid import Grid


def exchange_first_messages(grid: Grid) -> list[torch.Tensor]:
    """Sum in every group, then send this rank's number to each neighbouring stage and receive its. Every rank must call it.

    Returns what the neighbours sent, as it lies on the device: a tensor for each neighbour and group that carries messages.
    """
    if dist.get_world_size() == 1:
        return []
    for group in (None, *_groups(grid)):
        dist.all_reduce(torch.ones(1, device=grid.device), group=group)
    carriers = [group for group in (grid.down_group, grid.up_group) if group is not None]
    heard = [_exchange(grid, stage, group) for stage in _neighbours(grid) for group in carriers]
    if grid.device.type == "cuda":
        torch.cuda.synchronize(grid.device)
    return heard


def _groups(grid: Grid) -> list[dist.ProcessGroup]:
    """Return this rank's groups, in an order that is the same on all ranks."""
    found = [getattr(grid, field.name) for field in fields(grid) if field.name.endswith("_group")]
    return list(dict.fromkeys(group for group in found if group is not None))


def _neighbours(grid: Grid) -> list[int]:
    """Return the stages beside this one, in an order in which no chain of ranks waits: the pairs (0, 1), (2, 3) are first.

    The last are the first stage and the last one, where chunks go around.
    """
    stage = grid.pipeline_rank
    both = (stage + 1, stage - 1) if stage % 2 == 0 else (stage - 1, stage + 1)
    around = grid.chunks > 1 and not grid.folded and grid.pipeline > 2 and stage in (0, grid.pipeline - 1)
    return [neighbour for neighbour in both if 0 <= neighbour < grid.pipeline] + [grid.pipeline - 1 - stage] * around


def _exchange(grid: Grid, stage: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Send and receive; the earlier stage sends first."""
    peer = grid.rank_of_stage(stage)
    own = torch.full((1,), float(grid.rank), device=grid.device)
    got = torch.empty_like(own)
    calls = [lambda: dist.send(own, peer, group=group), lambda: dist.recv(got, peer, group=group)]
    for call in calls if grid.pipeline_rank < stage else reversed(calls):
        call()
    return got
