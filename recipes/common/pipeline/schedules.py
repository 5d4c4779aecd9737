"""Pipeline schedules as data: which pass of which micro batch each rank runs, in which order.

A model is a row of chunks of layers. A pass is one micro batch through one chunk: F forward, B the gradient of its input, W those
of its weights (in 1F1B, B computes both and there is no W). With "1f1b" and "zero_bubble" (ZB-H1, arXiv 2401.10241) each rank has
v chunks, and the row goes around the ranks v times (one: 1F1B itself; more: interleaved, arXiv 2104.04473). Two ranks, two micro
batches, chunks a to d, 1F1B, a backward pass twice as long as a forward pass:

    rank 0  F0a F1a F0c F1c  .   .  B0c B0c B1c B1c B0a B0a B1a B1a     chunks a and c
    rank 1   .  F0b F1b F0d B0d B0d F1d B1d B1d B0b B0b B1b B1b         chunks b and d

With "zero_bubble_v" (ZB-V, arXiv 2405.15362) rank r of p has two, r and 2p - 1 - r: the row is folded, so that the first rank has
the first layers and the last ones, and a micro batch turns at the last rank. Two ranks, three micro batches, all passes equally
long:

    rank 0  F0a F1a F2a F0d B0d W0d F1d B1d B0a W1d W0a  .  F2d B2d B1a W2d W1a B2a W2a      chunks a and d
    rank 1   .  F0b F0c F1b F1c B0c B0b W0c B1c W1c F2b F2c B1b W0b B2c W2c B2b W1b W2b      chunks b and c

Bubbles, where the passes of all of a rank's layers take F, B and W, and p divides the micro batches: 1F1B (p - 1)(F + B + W) / v,
ZB-H1 (p - 1)(F + B - W) / v, and ZB-V, where F = B = W, (p - 1)F / 2: the time until the last rank has its first input. No zero
bubble keeps more activations in flight on a rank than 1F1B does on its first stage, p micro batches of all of its layers,
and ZB-V counts those that have become factors of weight gradients among them;
interleaved 1F1B keeps (v + 1 - 1/p)p / v there, so that messages have time to travel.
"""

from __future__ import annotations

from collections import deque
from math import inf
from typing import NamedTuple

from recipes.common.config.placement import ONE_PASS, Placement

FORWARD, INPUTS, WEIGHTS = "F", "B", "W"
# passes' weight gradients that a folded rank may defer where layers are recomputed: of each it holds all of a chunk's factors
MOST_DEFERRED = 2


class Pass(NamedTuple):
    kind: str  # FORWARD, INPUTS or WEIGHTS
    micro_batch: int
    chunk: int


class Costs(NamedTuple):
    """Costs of one micro batch's passes through one chunk, in any unit of time; and what decides about its memory."""

    forward: float
    inputs: float
    weights: float
    late: float = 0.0  # of the rank after `inputs`, for whose end nobody waits
    layers: int = 1  # whose activations are held from F to W
    recomputed: bool = False  # some of them: what waits for W is more than what F has kept

    def of(self, kind: str) -> float:
        return self[(FORWARD, INPUTS, WEIGHTS).index(kind)]


class Message(NamedTuple):
    """An input that a pass needs from another rank: the activation (FORWARD) or the gradient (INPUTS) that enters `chunk`."""

    kind: str
    micro_batch: int
    chunk: int


def needs(step: Pass, chunks: int) -> Pass | None:
    """Return the pass, of whatever rank, that must be over before `step` can begin; None for those that read the data."""
    kind, micro_batch, chunk = step
    if kind == FORWARD:
        return Pass(FORWARD, micro_batch, chunk - 1) if chunk else None
    if kind == INPUTS:
        return Pass(INPUTS, micro_batch, chunk + 1) if chunk < chunks - 1 else Pass(FORWARD, micro_batch, chunk)
    return Pass(INPUTS, micro_batch, chunk)


def order_passes(placement: Placement, micro_batches: int, costs: tuple[Costs, ...]) -> list[list[Pass]]:
    """Return the passes of every rank, in order. The chunks' `costs` shape "zero_bubble_v"."""
    pipeline = placement.pipeline
    if not placement.folded:
        return [_around(placement, rank, micro_batches) for rank in range(pipeline)]
    # several ways to be greedy, each best somewhere: the shortest is taken, the first of equals
    shortest, orders, as_before = inf, [], set()
    for max_deferred in _max_deferred(pipeline, costs):
        for forward_first in (False, True):
            if forward_first in as_before:
                continue
            greedy = _Folded(pipeline, micro_batches, costs, max_deferred, forward_first)
            span = greedy.run(shortest)
            if span < shortest:
                shortest, orders = span, greedy.passes
            if not greedy.was_limited:
                as_before.add(forward_first)  # a higher limit changes nothing
    return orders


def _max_deferred(pipeline: int, costs: tuple[Costs, ...]) -> tuple[int, ...]:
    """Return how many weight gradients a rank of a folded pipeline may defer: the numbers to try, the most last."""
    return (1, MOST_DEFERRED) if any(each.recomputed for each in costs) else (1, 2, pipeline, 2 * pipeline)


def _around(placement: Placement, rank: int, micro_batches: int) -> list[Pass]:
    """Return the passes of a rank whose chunks go around the ranks: as many micro batches as ranks run a lap, then the next lap.

    A zero bubble defers up to `rank` weight gradients until the last forward pass. Where the ranks do not divide the micro
    batches, the order is that of the next multiple, without what is not there.
    """
    zero_bubble, own, ranks = placement.schedule != ONE_PASS, placement.chunks_of(rank), placement.pipeline
    forward, backward = _laps(placement, own, micro_batches), _laps(placement, own[::-1], micro_batches)
    # forward passes before the first backward pass: the laps, and the way to the last rank and back. With several laps and
    # nothing to fill the time, a pass more for each rank on the way, under which messages travel (arXiv 2104.04473)
    way = (ranks - 1 - rank) * (2 if len(own) > 1 and not zero_bubble else 1)
    ahead = (len(own) - 1) * ranks + way + 1
    passes, deferred = [Pass(FORWARD, *each) for each in forward[:ahead]], deque()
    for index, each in enumerate(backward):
        passes.append(Pass(INPUTS, *each))
        if zero_bubble:
            deferred.append(Pass(WEIGHTS, *each))
            if index + ahead >= len(forward) or len(deferred) > rank:
                passes.append(deferred.popleft())
        if index + ahead < len(forward):
            passes.append(Pass(FORWARD, *forward[index + ahead]))
    passes += deferred
    return [step for step in passes if step.micro_batch < micro_batches]


def _laps(placement: Placement, chunks: tuple[int, ...], micro_batches: int) -> list[tuple[int, int]]:
    """Return (micro batch, chunk) in the order of the passes of one kind; with several laps, up to a multiple of the ranks."""
    together = placement.pipeline if len(chunks) > 1 else 1
    return [
        (micro_batch, chunk)
        for first in range(0, micro_batches, together)
        for chunk in chunks
        for micro_batch in range(first, first + together)
    ]


def forward_passes(placement: Placement, rank: int, micro_batches: int) -> list[Pass]:
    """Return a rank's forward passes of an evaluation, in order.

    In a folded pipeline's upward half rank r starts p - 1 - r micro batches late, so that it never blocks the downward half.
    """
    own = placement.chunks_of(rank)
    if placement.folded:
        late = placement.pipeline - 1 - rank
        passes = [(k if chunk == rank else k + late, chunk, k) for chunk in own for k in range(micro_batches)]
        return [Pass(FORWARD, micro_batch, chunk) for _, chunk, micro_batch in sorted(passes)]
    return [Pass(FORWARD, *each) for each in _laps(placement, own, micro_batches) if each[0] < micro_batches]


class _Folded:
    """Builds a greedy order of two chunks a rank: the pass that can start first runs; ties are broken by priority.

    max_deferred: weight gradients that a rank may defer before it computes one. forward_first: forward passes go before backward
    ones. It costs a few list look-ups a pass: a rank's choice is made again only when it or a neighbour has ended a pass.
    """

    def __init__(
        self, pipeline: int, micro_batches: int, costs: tuple[Costs, ...], max_deferred: int, forward_first: bool
    ) -> None:
        self.pipeline, self.micro_batches = pipeline, micro_batches
        *seconds, self.late, self.layers, _ = zip(*costs, strict=True)
        self.seconds = dict(zip((FORWARD, INPUTS, WEIGHTS), seconds, strict=True))
        self.max_deferred, self.was_limited = max_deferred, False
        self.priorities = {FORWARD: 0, INPUTS: 1} if forward_first else {FORWARD: 1, INPUTS: 0}
        # when each pass ended, by kind and chunk: those of a chunk run in order, so a row's length counts them
        self.ends = {kind: [[] for _ in range(2 * pipeline)] for kind in (FORWARD, INPUTS, WEIGHTS)}
        # when what a pass needs had ended: the rows of the passes before it (see `needs`), which grow meanwhile
        forward, inputs = self.ends[FORWARD], self.ends[INPUTS]
        self.ready = {FORWARD: [[0.0] * micro_batches, *forward[:-1]], INPUTS: [*inputs[1:], forward[-1]]}
        self.clocks, self.passes = [0.0] * pipeline, [[] for _ in range(pipeline)]

    def run(self, shortest: float) -> float:
        """Fill `passes` and return when the last one ends; give up at infinity once that must be later than `shortest`."""
        a_micro_batch = [sum(of_chunk) for of_chunk in zip(*self.seconds.values(), self.late, strict=True)]
        needed = [self.micro_batches * (a_micro_batch[rank] + a_micro_batch[-1 - rank]) for rank in range(self.pipeline)]
        nexts = [self._next(rank) for rank in range(self.pipeline)]
        starts = [option[0] for option in nexts]
        while (start := min(starts)) < inf:
            rank = starts.index(start)
            *_, kind, chunk = nexts[rank]
            needed[rank] += start - self.clocks[rank]  # and what it lost
            if needed[rank] > shortest * (1 + 1e-9):  # no rounding makes up for that
                return inf
            row = self.ends[kind][chunk]
            self.passes[rank].append(Pass(kind, len(row), chunk))
            row.append(start + self.seconds[kind][chunk])
            self.clocks[rank] = row[-1] + (self.late[chunk] if kind == INPUTS else 0.0)
            for changed in {rank, self._waiting(kind, chunk, rank)}:
                nexts[changed] = self._next(changed)
                starts[changed] = nexts[changed][0]
        return max(self.clocks)

    def _next(self, rank: int) -> tuple[float, int, int, str, int]:
        """Return (when it can start, its priority, -chunk, kind, chunk) of what a rank runs next; at infinity if nothing can."""
        clock, low, high = self.clocks[rank], rank, 2 * self.pipeline - 1 - rank
        forward, inputs, weights = self.ends.values()
        owed_low, owed_high = len(inputs[low]) - len(weights[low]), len(inputs[high]) - len(weights[high])
        options = []
        if owed_low or owed_high:
            chunk = high if owed_high >= owed_low else low
            options.append((clock, 2, -chunk, WEIGHTS, chunk))
            if owed_low + owed_high > self.max_deferred:
                self.was_limited = True
                return options[0]
        # at most the activations that 1F1B's first stage holds, those of p micro batches of all of the rank's layers; downward
        # passes leave room for an upward one, or those could deadlock
        down, up = self.layers[low], self.layers[high]
        held = (len(forward[low]) - len(weights[low])) * down + (len(forward[high]) - len(weights[high])) * up
        for chunk, room in ((low, down + up), (high, up)):
            if held + room <= self.pipeline * (down + up):
                options += self._option(clock, FORWARD, chunk)
            if len(inputs[chunk]) < len(forward[chunk]):
                options += self._option(clock, INPUTS, chunk)
        return min(options, default=(inf, 0, 0, "", 0))

    def _waiting(self, kind: str, chunk: int, rank: int) -> int:
        """Return the rank whose choice `chunk`'s last pass changes beside its own `rank`'s: the next chunk's, if it waits."""
        target = chunk + 1 if kind == FORWARD else chunk - 1
        if kind == WEIGHTS or not 0 <= target < 2 * self.pipeline:
            return rank
        waits = len(self.ends[kind][target]) + 1 == len(self.ends[kind][chunk])
        return min(target, 2 * self.pipeline - 1 - target) if waits else rank

    def _option(self, clock: float, kind: str, chunk: int) -> list[tuple[float, int, int, str, int]]:
        ready, micro_batch = self.ready[kind][chunk], len(self.ends[kind][chunk])
        if micro_batch >= min(len(ready), self.micro_batches):
            return []
        return [(max(clock, ready[micro_batch]), self.priorities[kind], -chunk, kind, chunk)]


def finish_times(orders: list[list[Pass]], costs: tuple[Costs, ...]) -> list[float]:
    """Return when each rank is done, if passes take `costs` of their chunk and messages no time. AssertionError: a deadlock."""
    done: dict[Pass, float] = {}
    clocks, positions = [0.0] * len(orders), [0] * len(orders)
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            while positions[rank] < len(order):
                step = order[positions[rank]]
                before = needs(step, len(costs))
                if before is not None and before not in done:
                    break
                start = max(clocks[rank], done[before] if before else 0.0)
                done[step] = start + costs[step.chunk].of(step.kind)
                clocks[rank] = done[step] + (costs[step.chunk].late if step.kind == INPUTS else 0.0)
                positions[rank] += 1
                moved = True
    assert all(position == len(order) for position, order in zip(positions, orders, strict=True)), "deadlock"
    return clocks


def sent_messages(order: list[Pass], placement: Placement) -> list[tuple[int, Message]]:
    """Return (receiving rank, message) for every message that a rank with these passes sends, in order."""
    found = []
    for kind, micro_batch, chunk in order:
        target = chunk + 1 if kind == FORWARD else chunk - 1
        if kind == WEIGHTS or not 0 <= target < placement.count:
            continue
        if (target_rank := placement.rank_of(target)) != placement.rank_of(chunk):
            found.append((target_rank, Message(kind, micro_batch, target)))
    return found
