"""Runs collectives in the groups that training uses, and checks their results and bandwidth.

Bus bandwidth is that of nccl-tests (PERFORMANCE.md), with n the size of the group: what one link carries, whatever the group's
size. All groups of a kind run at the same time, as in a step.

    all_reduce   2 (n - 1) / n * bytes / seconds
    all_gather     (n - 1) / n * bytes of the result / seconds
    send_recv                    bytes / seconds
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from recipes.common.parallel.first_messages import exchange_first_messages
from recipes.common.parallel.grid import build_grid
from recipes.common.recipe import Layout
from tools.preflight.compute import wait

BYTES = {"cuda": 128 << 20, "cpu": 2 << 20}  # of a rank's buffer
REPEATS = 5
PERIOD = 1000  # of the values sent: sums of integers below 2^24 are exact in fp32


@dataclass(frozen=True, kw_only=True)
class CollectiveTiming:
    """One collective in one group, as one rank measured it."""

    kind: str  # tensor, pipeline, data, hosts
    operation: str  # all_reduce, all_gather, send_recv
    ranks: tuple[int, ...]
    seconds: float  # median
    bus_bytes_per_second: float
    wrong: str | None  # the first wrong element


def join_group(store: dist.Store, rank: int, world_size: int, device: torch.device, seconds: float) -> None:
    """Create the default process group as training does, without a device (recipes.common.engine.startup).

    Its timeout is longer than ours, so that we report which rank hangs.
    """
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=2 * seconds),
    )


def collective_facts(layout: Layout, device: torch.device, leaders: list[int], begun: list[str]) -> list[dict[str, Any]]:
    """Measure every collective of this rank's groups, then a ring of the hosts' first ranks.

    begun: gets each one's name before it starts, so that a caller that gives up knows where it hangs.
    """
    begun.append("making the groups")
    grid = build_grid(layout, device)
    begun.append("the first message of every group and neighbour")
    exchange_first_messages(grid)
    values = torch.arange(BYTES[device.type] // 4, device=device, dtype=torch.int64) % PERIOD
    found = []
    for kind, group in (("tensor", grid.tensor_group), ("data", grid.data_group)):
        if group is not None:
            begun.append(f"{kind} all_reduce")
            found.append(_all_reduce(kind, group, values))
            begun.append(f"{kind} all_gather")
            found.append(_all_gather(kind, group, values))
        begun.append(f"the wait for all {kind} groups")
        dist.barrier()  # one kind after another: they share links
    stages = dist.get_process_group_ranks(grid.pipeline_group) if grid.pipeline_group is not None else []
    begun.append("pipeline send_recv")
    found += _between_neighbours("pipeline", stages, grid.pipeline_group, values)
    begun.append("send_recv between hosts")
    if len(leaders) > 2:  # for two hosts the groups show the same
        found += _between_neighbours("hosts", leaders, None, values, closed=True)
    return [asdict(one) for one in found]


def _payload(values: torch.Tensor, rank: int) -> torch.Tensor:
    """Return what a rank sends: integers that depend on the position and on the rank."""
    return ((values + rank) % PERIOD).float()


def _all_reduce(kind: str, group: dist.ProcessGroup, values: torch.Tensor) -> CollectiveTiming:
    ranks = dist.get_process_group_ranks(group)
    own = _payload(values, dist.get_rank())
    expected = torch.zeros_like(own)
    for rank in ranks:
        expected += _payload(values, rank)
    buffer = own.clone()
    dist.all_reduce(buffer, group=group)
    wrong = first_wrong(buffer, expected)
    seconds = _median(lambda: dist.all_reduce(buffer, group=group), group, own.device)
    size = own.numel() * own.element_size()
    return _measured(kind, "all_reduce", ranks, seconds, 2 * (len(ranks) - 1) / len(ranks) * size / seconds, wrong)


def _all_gather(kind: str, group: dist.ProcessGroup, values: torch.Tensor) -> CollectiveTiming:
    ranks = dist.get_process_group_ranks(group)
    part = values[: len(values) // len(ranks)]
    own = _payload(part, dist.get_rank())
    parts = [torch.empty_like(own) for _ in ranks]
    dist.all_gather(parts, own, group=group)
    wrong = None
    for rank, got in zip(ranks, parts, strict=True):
        if (fault := first_wrong(got, _payload(part, rank))) is not None:
            wrong = f"of rank {rank}'s part, {fault}"
            break
    seconds = _median(lambda: dist.all_gather(parts, own, group=group), group, own.device)
    total = own.numel() * own.element_size() * len(ranks)
    return _measured(kind, "all_gather", ranks, seconds, (len(ranks) - 1) / len(ranks) * total / seconds, wrong)


def pairs(count: int, *, closed: bool) -> list[tuple[int, int, int]]:
    """Return neighbours in a line or a ring of `count` as (index, next index, turn); pairs of one turn are disjoint."""
    line = [(place, place + 1, place % 2) for place in range(count - 1)]
    return [*line, (count - 1, 0, 1 if count % 2 == 0 else 2)] if closed else line


def _between_neighbours(
    kind: str, ranks: list[int], group: dist.ProcessGroup | None, values: torch.Tensor, *, closed: bool = False
) -> list[CollectiveTiming]:
    """Measure send and receive between neighbours. Every rank of the world must call this, for the barriers."""
    me = dist.get_rank()
    found = []
    for turn in range(3 if closed else 2):
        for one, other, when in pairs(len(ranks), closed=closed):
            if when == turn and me in (ranks[one], ranks[other]):
                found.append(_there_and_back(kind, ranks[one], ranks[other], group, values))
        dist.barrier()
    return found


def _there_and_back(kind: str, one: int, other: int, group: dist.ProcessGroup | None, values: torch.Tensor) -> CollectiveTiming:
    first = dist.get_rank() == one
    peer = other if first else one
    own, got = _payload(values, dist.get_rank()), torch.empty(len(values), device=values.device)

    def exchange() -> None:
        if first:
            dist.send(own, peer, group=group)
            dist.recv(got, peer, group=group)
        else:
            dist.recv(got, peer, group=group)
            dist.send(own, peer, group=group)

    exchange()
    wrong = first_wrong(got, _payload(values, peer))
    seconds = _median(exchange, None, values.device) / 2
    return _measured(kind, "send_recv", [one, other], seconds, own.numel() * own.element_size() / seconds, wrong)


def _median(work: Callable[[], Any], group: dist.ProcessGroup | None, device: torch.device) -> float:
    """Return the median seconds of one call. group: its ranks start together; None where the calls themselves synchronise."""
    taken = []
    for _ in range(REPEATS):
        if group is not None:
            dist.barrier(group=group)
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def first_wrong(got: torch.Tensor, expected: torch.Tensor) -> str | None:
    """Describe the first element that differs."""
    if torch.equal(got, expected):
        return None
    at = int(torch.nonzero(got != expected)[0])
    return f"element {at} is {got[at].item():g} instead of {expected[at].item():g}"


def _measured(kind: str, operation: str, ranks: list[int], seconds: float, speed: float, wrong: str | None) -> CollectiveTiming:
    return CollectiveTiming(
        kind=kind, operation=operation, ranks=tuple(ranks), seconds=seconds, bus_bytes_per_second=speed, wrong=wrong
    )
