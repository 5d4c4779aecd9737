"""Plays the messages of a schedule on NCCL's streams, without a GPU, and says whether they can block each other for ever.

A rank hands its device operations in the order of its program. Those of one stream run one after another; a message moves when
both sides have come to it; what is posted waits for all that the rank has computed before. Which messages share a stream depends
on how the process group was started (torch's ProcessGroupNCCL::pointToPoint):

    PAIR   without a device: a stream for each pair of ranks in a group. Ours: recipes.common.engine.startup
    GROUP  bound to a device: one stream for all messages of a group

All schedules run on PAIR. "1f1b" and "zero_bubble" with one chunk a rank run on GROUP too. Folded and interleaved, the first and
the last rank send both ways what others send one way, and there are orders in which, with one stream a group, a rank's message
stands behind one that waits for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

from recipes.common.config.placement import Placement
from recipes.common.pipeline.schedules import (
    Costs,
    Message,
    Pass,
    forward_passes,
    needs,
    order_passes,
    sent_messages,
)

PAIR, GROUP = "pair", "group"
STREAMS = {PAIR: "a stream for each pair of ranks", GROUP: "one stream for each group"}
AHEAD = 1  # passes ahead of which the executor posts a receive
_COMPUTE = "compute"  # a rank's own stream


class Operation(NamedTuple):
    """What a rank hands its device: a pass, or its side of a message."""

    event: Pass | Message
    streams: tuple[tuple | str, ...]  # whose turn it needs; _COMPUTE among them: the rank's next pass waits for it
    after: Pass | Message | None = None  # what must be over before, besides


Program = list[Operation]  # of one rank, in order
Key = tuple[type, Pass | Message]


def training_programs(
    placement: Placement, micro_batches: int, costs: tuple[Costs, ...], streams: str, ahead: int = AHEAD
) -> list[Program]:
    """Return what every rank hands its device in a step of this schedule."""
    return _programs(order_passes(placement, micro_batches, costs), placement, streams, ahead)


def evaluation_programs(placement: Placement, micro_batches: int, streams: str) -> list[Program]:
    """Return what every rank hands its device in an evaluation."""
    orders = [forward_passes(placement, rank, micro_batches) for rank in range(placement.pipeline)]
    return _programs(orders, placement, streams)


def _programs(orders: list[list[Pass]], placement: Placement, streams: str, ahead: int = AHEAD) -> list[Program]:
    sent = [sent_messages(order, placement) for order in orders]
    return [executor_program(orders[rank], sent, placement, rank, streams, ahead) for rank in range(placement.pipeline)]


def executor_program(
    order: list[Pass], sent: list[list[tuple[int, Message]]], placement: Placement, rank: int, streams: str, ahead: int = AHEAD
) -> Program:
    """Return a rank's program as PipelineExecutor runs it: receives posted `ahead` passes early, and only inputs waited for.

    order: its own passes. sent: the `sent_messages` of every rank.
    """
    coming = {stage: deque(message for to, message in sent[stage] if to == rank) for stage in placement.neighbours_of(rank)}
    sender = {message: stage for stage, messages in coming.items() for message in messages}

    def received(step: Pass) -> Message | None:
        before = needs(step, placement.count)
        if before is None or placement.rank_of(before.chunk) == rank:
            return None
        return Message(step.kind, step.micro_batch, step.chunk)

    program: Program = []
    last: Pass | None = None
    awaited = [received(step) for step in order]
    for index, step in enumerate(order):
        for message in awaited[index : index + ahead + 1]:
            while message in sender:
                stage = sender[message]
                channel = _channel("down" if stage < rank else "up", rank, stage, streams)
                posted = coming[stage].popleft()
                del sender[posted]
                program.append(Operation(posted, (channel,), last))
        program.append(Operation(step, (_COMPUTE,), awaited[index]))
        for to, message in sent_messages([step], placement):
            program.append(Operation(message, (_channel("down" if to > rank else "up", rank, to, streams),), step))
        last = step
    return program


def _channel(group: str, rank: int, peer: int, streams: str) -> tuple:
    """Return the name of the stream that a rank's messages with `peer` in `group` are on."""
    return (group, min(rank, peer), max(rank, peer)) if streams == PAIR else (group,)


def finish_times(programs: list[Program], costs: tuple[Costs, ...]) -> list[float]:
    """Return when each rank is done, if passes take `costs`, without what is late, and messages no time.

    Raises CycleError for a deadlock.
    """
    needed = _needed(programs)
    ends: dict[Key, float] = {}
    for key in TopologicalSorter(needed).static_order():
        kind, event = key
        seconds = costs[event.chunk].of(event.kind) if kind is Pass else 0.0
        ends[key] = max((ends[before] for before in needed[key]), default=0.0) + seconds
    return [max(ends[_key(operation.event)] for operation in program) for program in programs]


def deadlock(programs: list[Program]) -> str | None:
    """Return which passes and messages wait for each other in a ring; None if all come to their end."""
    try:
        TopologicalSorter(_needed(programs)).prepare()
    except CycleError as error:
        return " before ".join(_words(event) for _, event in error.args[1])
    return None


def _needed(programs: list[Program]) -> dict[Key, set[Key]]:
    """Return for every event what must be over before; both sides of a message are one event."""
    needed: dict[Key, set[Key]] = {}
    for program in programs:
        last: dict[tuple | str, Key] = {}
        for event, streams, after in program:
            key = _key(event)
            befores = needed.setdefault(key, set())
            befores.update(last[stream] for stream in streams if stream in last)
            if after is not None:
                befores.add(_key(after))
            last |= dict.fromkeys(streams, key)
    return needed


def _key(event: Pass | Message) -> Key:
    return type(event), event  # a pass equals the message that it needs, as tuples do


def _words(event: Pass | Message) -> str:
    if isinstance(event, Pass):
        return f"{event.kind}{event.micro_batch} in chunk {event.chunk}"
    return f"the message for {event.kind}{event.micro_batch} to chunk {event.chunk}"


def schedule_problem(placement: Placement, micro_batches: Iterable[int], costs: tuple[Costs, ...], streams: str) -> str | None:
    """Return why a schedule cannot run on such streams with each of these numbers of micro batches, or None.

    Evaluations may have any number: what differs is how many are left of a lap. With one chunk a rank, what fewer do is the
    beginning of what more do, so that the most stand for all.
    """
    most = 2 * placement.pipeline
    training = ((count, training_programs(placement, count, costs, streams)) for count in sorted(set(micro_batches)))
    evaluated = range(1 if placement.per_rank > 1 else most - 1, most)
    evaluations = ((count, evaluation_programs(placement, count, streams)) for count in evaluated)
    for what, programs in ((" in a step", training), (" in an evaluation", evaluations)):
        for count, of_ranks in programs:
            if ring := deadlock(of_ranks):
                return (
                    f"{placement.words} with pipeline={placement.pipeline} and {count} micro batches{what} would wait for ever "
                    f"on {STREAMS[streams]}: {ring}"
                )
    return None
