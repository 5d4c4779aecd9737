"""Pipeline schedules as data: which pass of which micro batch each rank runs, in which order.

A model is a row of chunks of layers. A pass is one micro batch through one chunk: F forward, B the gradient of its input, W those
of its weights (in 1F1B, B computes both and there is no W). With "1f1b" (arXiv 2104.04473) and "zero_bubble" (ZB-H1, arXiv
2401.10241) each rank has one chunk. With "zero_bubble_v" (ZB-V, arXiv 2405.15362) rank r of p has two, r and 2p - 1 - r: the row
is folded, so that the first rank has the first layers and the last ones, and a micro batch turns at the last rank.

Bubbles, where every chunk's passes take F, B and W on a rank: 1F1B (p - 1)(F + B + W), ZB-H1 (p - 1)(F + B - W), and ZB-V,
where F = B = W, (p - 1)F / 2: what it takes until the last rank has something to do. No schedule keeps more activations in
flight on a rank than 1F1B does on its first stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from recipes.common.config.placement import FOLDED, ZERO_BUBBLE, chunk_count, chunks_of_rank, rank_of_chunk

FORWARD, INPUTS, WEIGHTS = "F", "B", "W"


class Pass(NamedTuple):
    kind: str  # FORWARD, INPUTS or WEIGHTS
    micro_batch: int
    chunk: int


class Costs(NamedTuple):
    """Of one micro batch in one chunk, in any unit of time."""

    forward: float
    inputs: float
    weights: float


class Message(NamedTuple):
    """What a pass needs of another rank: the activation (FORWARD) or the gradient (INPUTS) that `chunk` is given."""

    kind: str
    micro_batch: int
    chunk: int


def needs(step: Pass, chunks: int) -> Pass | None:
    """The pass, of whatever rank, that must be over before `step` can begin; None for those that read the data."""
    kind, i, chunk = step
    if kind == FORWARD:
        return Pass(FORWARD, i, chunk - 1) if chunk else None
    if kind == INPUTS:
        return Pass(INPUTS, i, chunk + 1) if chunk < chunks - 1 else Pass(FORWARD, i, chunk)
    return Pass(INPUTS, i, chunk)


def plan_passes(schedule: str, pipeline: int, micro_batches: int, costs: tuple[Costs, ...] = ()) -> list[list[Pass]]:
    """The passes of every rank, in order. `costs` of every chunk shape "zero_bubble_v"; without them all passes are as long."""
    if schedule != FOLDED:
        return [list(_one_chunk(pipeline, rank, micro_batches, schedule == ZERO_BUBBLE)) for rank in range(pipeline)]
    costs = costs or (Costs(1.0, 1.0, 1.0),) * (2 * pipeline)
    # several ways to be greedy, each best somewhere: the shortest is taken, the first of equals
    plans = [_Folded(pipeline, micro_batches, costs, owed, eager).plan() for owed in (1, 2, pipeline, 2 * pipeline)
             for eager in (False, True)]  # fmt: skip
    return min(plans, key=lambda plan: plan.span).order


def _one_chunk(pipeline: int, rank: int, micro_batches: int, split: bool) -> Iterator[Pass]:
    """A rank that owes the weight gradients of up to `rank` micro batches until the last forward pass."""
    ahead, made_up = min(pipeline - rank, micro_batches), 0
    yield from (Pass(FORWARD, i, rank) for i in range(ahead))
    for i in range(micro_batches):
        yield Pass(INPUTS, i, rank)
        if split and (i + ahead >= micro_batches or i + 1 - made_up > rank):
            yield Pass(WEIGHTS, made_up, rank)
            made_up += 1
        if i + ahead < micro_batches:
            yield Pass(FORWARD, i + ahead, rank)
    yield from (Pass(WEIGHTS, i, rank) for i in range(made_up, micro_batches) if split)


@dataclass(frozen=True)
class Plan:
    span: float  # from the first pass to the end of the last
    order: list[list[Pass]]  # by rank


def forward_passes(schedule: str, pipeline: int, rank: int, micro_batches: int) -> list[Pass]:
    """An evaluation's. On the way up a rank lets as many micro batches go before as there are ranks between it and the turn."""
    chunks = chunks_of_rank(schedule, pipeline, rank)
    late = pipeline - 1 - rank
    passes = [(k if chunk == rank else k + late, chunk, k) for chunk in chunks for k in range(micro_batches)]
    return [Pass(FORWARD, micro_batch, chunk) for _, chunk, micro_batch in sorted(passes)]


class _Folded:
    """A greedy schedule of two chunks a rank: whoever can begin first does, by rank of its passes' urgency.

    `owed`: weight gradients that a rank may owe before it makes one up. `eager`: forward passes go before backward ones.
    """

    def __init__(self, pipeline: int, micro_batches: int, costs: tuple[Costs, ...], owed: int, eager: bool) -> None:
        self.pipeline, self.micro_batches, self.costs, self.owed, self.eager = pipeline, micro_batches, costs, owed, eager
        self.chunks = 2 * pipeline
        self.done: dict[Pass, float] = {}
        self.counts = {kind: [0] * self.chunks for kind in (FORWARD, INPUTS, WEIGHTS)}
        self.clocks, self.order = [0.0] * pipeline, [[] for _ in range(pipeline)]

    def plan(self) -> Plan:
        nexts = [self._next(rank) for rank in range(self.pipeline)]
        while any(nexts):
            rank = min((rank for rank, option in enumerate(nexts) if option), key=lambda rank: nexts[rank][0])
            start, _, step = nexts[rank]
            self.clocks[rank] = self.done[step] = start + self.costs[step.chunk]["FBW".index(step.kind)]
            self.counts[step.kind][step.chunk] += 1
            self.order[rank].append(step)
            for other in {rank, max(rank - 1, 0), min(rank + 1, self.pipeline - 1)}:
                nexts[other] = self._next(other)
        return Plan(max(self.clocks), self.order)

    def _next(self, rank: int) -> tuple[float, tuple[int, int], Pass] | None:
        """(when it can begin, its urgency, what): the first that can begin, by urgency among those; None if nothing can."""
        begun, given, made_up = (self.counts[kind] for kind in (FORWARD, INPUTS, WEIGHTS))
        own = chunks_of_rank(FOLDED, self.pipeline, rank)
        waiting = [chunk for chunk in own if given[chunk] > made_up[chunk]]
        owed = sum(given[chunk] - made_up[chunk] for chunk in own)
        options = []
        if waiting:
            chunk = max(waiting, key=lambda c: (given[c] - made_up[c], c))
            options.append((self.clocks[rank], (2, -chunk), Pass(WEIGHTS, made_up[chunk], chunk)))
            if owed > self.owed:
                return options[0]
        in_flight = sum(begun[chunk] - made_up[chunk] for chunk in own)
        for chunk in own:
            # as many as fill 1F1B's first stage; the way down leaves a place, without which the way up could not be gone
            room = self.chunks if chunk >= self.pipeline else self.chunks - 1
            if in_flight < room:
                options += self._option(Pass(FORWARD, begun[chunk], chunk), 0 if self.eager else 1)
            options += self._option(Pass(INPUTS, given[chunk], chunk), 1 if self.eager else 0)
        return min(options) if options else None

    def _option(self, step: Pass, urgency: int) -> list[tuple[float, tuple[int, int], Pass]]:
        if step.micro_batch == self.micro_batches:
            return []
        own = Pass(FORWARD, step.micro_batch, step.chunk)
        wanted = [before for before in (needs(step, self.chunks), own if step.kind == INPUTS else None) if before]
        if any(before not in self.done for before in wanted):
            return []
        rank = rank_of_chunk(FOLDED, self.pipeline, step.chunk)
        start = max([self.clocks[rank], *(self.done[before] for before in wanted)])
        return [(start, (urgency, -step.chunk), step)]


def finish_times(plan: list[list[Pass]], costs: tuple[Costs, ...]) -> list[float]:
    """When each rank is done, if passes take `costs` of their chunk and messages no time. AssertionError for a deadlock."""
    done: dict[Pass, float] = {}
    clocks, places = [0.0] * len(plan), [0] * len(plan)
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(plan):
            while places[rank] < len(order):
                step = order[places[rank]]
                before = needs(step, len(costs))
                if before is not None and before not in done:
                    break
                begun = max(clocks[rank], done[before] if before else 0.0)
                clocks[rank] = done[step] = begun + costs[step.chunk]["FBW".index(step.kind)]
                places[rank] += 1
                moved = True
    assert all(place == len(order) for place, order in zip(places, plan, strict=True)), "deadlock"
    return clocks


def sent_messages(order: list[Pass], schedule: str, pipeline: int) -> list[tuple[int, Message]]:
    """(to which rank, what) for every message that a rank with these passes sends, in order."""
    chunks, found = chunk_count(schedule, pipeline), []
    for kind, i, chunk in order:
        target = chunk + 1 if kind == FORWARD else chunk - 1
        if kind == WEIGHTS or not 0 <= target < chunks:
            continue
        here, there = (rank_of_chunk(schedule, pipeline, c) for c in (chunk, target))
        if here != there:
            found.append((there, Message(kind, i, target)))
    return found
