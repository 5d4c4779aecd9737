"""Measures where the time of a step goes, on this rank: spans around the parts of a step, and an account of them.

A rank does one thing at a time, so every moment of a step belongs to the innermost open span, and the parts add up to the step.
A span costs two stamps. On CPUs a stamp is the clock; on GPUs it is a CUDA event in the stream, read while the next step runs, so
that nothing waits. What runs in another stream beside the computation is not timed: it is exposed only where the computation
waits for it.

There is one clock a process: autograd runs backward collectives in its own threads, which see no context. It is off until
`start`, and between `end_step` and the next phase.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from recipes.common.config.placement import Coordinates, rank_coordinates

DATA, FORWARD, BACKWARD, RECOMPUTE, WEIGHTS = "data", "forward", "backward", "recompute", "weight_gradients"
OPTIMIZER, TENSOR, CONTEXT, EXPERT = "optimizer", "tensor", "context", "expert"
DATA_PARALLEL, ALL_RANKS = "data_parallel", "all_ranks"
WARM_UP, PIPELINE, COOL_DOWN = "pipeline_warm_up", "pipeline_steady", "pipeline_cool_down"
HOST, EVALUATE, SAVE, OTHER = "host", "evaluate", "save", "other"
# The parts of a step. The three of the pipeline are messages between stages and waiting for them: before the first forward pass,
# after the last backward pass, and between. tensor, context, expert, data_parallel: exposed communication in that group.
# host: the loop after the step. other: inside the step, in no span.
PARTS = (
    DATA, FORWARD, BACKWARD, RECOMPUTE, WEIGHTS, OPTIMIZER, TENSOR, CONTEXT, EXPERT, DATA_PARALLEL, ALL_RANKS, WARM_UP,
    PIPELINE, COOL_DOWN, HOST, EVALUATE, SAVE, OTHER,
)  # fmt: skip
COMPUTE = (FORWARD, BACKWARD, RECOMPUTE, WEIGHTS, OPTIMIZER)  # a rank's own work, by which a slow rank is recognised

Stamp = Any  # ns, or a CUDA event


class CommKey(NamedTuple):
    """One kind of communication."""

    group: str  # the axes along which its ranks differ: "tensor", "data", "pipeline", "tensor x data", ...; "context"; "expert"
    op: str  # as torch.distributed names it
    bytes: int  # of the whole: an all-gather's output, a reduce-scatter's input, else the tensor
    ranks: int  # of the group
    peer: int  # the other rank of a message, -1 for a collective


class Span:
    """Stamps its begin and its end, as a context manager. It holds no state: one serves every use, nested ones too."""

    __slots__ = ("_clock", "comm", "part")

    def __init__(self, clock: Clock, part: str, comm: CommKey | None) -> None:
        self._clock, self.part, self.comm = clock, part, comm

    def __enter__(self) -> None:
        self._clock.mark(self)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._clock.mark(None)


Mark = tuple[Span | str | None, Stamp]  # a span opens, a phase of the loop begins, the innermost span ends


@dataclass(frozen=True)
class StepTimes:
    """One step, in nanoseconds."""

    step: int
    began: int  # Unix
    micro_batches: int
    parts: dict[str, int]  # by PARTS; they add up to the step
    comms: dict[CommKey, list[int]]  # how many, all of their time, the shortest
    marks: list[tuple[Span | str | None, int]]  # since the step began; empty unless asked for


class Clock:
    """Keeps the account. Call `start`; in each step `begin_step`, `phase` at each new one, `end_step`; `taken` has results."""

    def __init__(self) -> None:
        self._spans: dict[tuple[str, CommKey | None], Span] = {}
        self._groups: dict[Any, tuple[str, str, int]] = {}
        self._coordinates: Coordinates | None = None
        self._stream: Any = None  # on GPUs, the one that computes
        self._events: list[Any] = []  # to be used again
        self._marks: list[Mark] = []
        self._running = False
        self._step, self._began, self._keep_marks = 0, 0, False
        self._pending: list[tuple[int, int, bool, list[Mark]]] = []
        self._taken: list[StepTimes] = []

    def start(self, coordinates: Coordinates, device: torch.device, named: Mapping[dist.ProcessGroup, str]) -> None:
        """Count from here on. named: this rank's groups, with their part, whose ranks may be those of a data group as well."""
        self.__init__()
        self._coordinates = coordinates
        self._groups = {group: (part, part, dist.get_world_size(group)) for group, part in named.items()}
        if device.type == "cuda":
            self._stream = torch.cuda.current_stream(device)

    def begin_step(self, step: int, *, keep_marks: bool = False) -> None:
        """Call before any work of `step` but loading its data; the GPU must be idle."""
        self._marks, self._running = [], self._coordinates is not None
        self._step, self._keep_marks, self._began = step, keep_marks, time.time_ns()
        self.phase(DATA)

    def phase(self, part: str, *, spans: bool = True) -> None:
        """Count what follows, where no span is open, as `part`. spans: whether any may open."""
        if self._coordinates is not None:
            self._running = True
            self.mark(part)
            self._running = spans

    def end_step(self) -> None:
        if self._marks:
            self.phase(OTHER)
            self._pending.append((self._step, self._began, self._keep_marks, self._marks))
            self._marks = []
        self._running = False
        if self._stream is None:
            self.settle()

    def settle(self, *, wait: bool = False) -> None:
        """Account for steps that have ended. On a GPU, call it where the host is about to wait for the device anyway.

        wait: wait for the last step too.
        """
        while self._pending:
            step, began, keep, marks = self._pending[0]
            if self._stream is not None and wait:
                marks[-1][1].synchronize()
            elif self._stream is not None and not marks[-1][1].query():
                return
            self._pending.pop(0)
            times = self._read(marks)
            parts, comms = account(times, pipelined=self._coordinates.pipeline > 1)
            forwards = sum(type(what) is Span and what.part == FORWARD for what, _ in times)
            micro_batches = forwards // self._coordinates.chunks  # each passes all of a rank's chunks
            start = times[0][1]
            kept = [(what, stamp - start) for what, stamp in times] if keep else []
            self._taken.append(StepTimes(step, began, micro_batches, parts, comms, kept))

    def taken(self) -> list[StepTimes]:
        """Return the steps accounted for since the last call."""
        taken, self._taken = self._taken, []
        return taken

    def span(self, part: str) -> Span:
        return self._span(part, None)

    def collective(self, op: str, count: int, group: dist.ProcessGroup | None) -> Span:
        """Return the span of a collective over `group` (None: all ranks) of `count` bytes, as CommKey counts them."""
        if not self._running:
            return self._span(OTHER, None)
        known = self._groups.get(group)
        if known is None:
            known = self._groups[group] = self._describe(dist.get_process_group_ranks(group))
        part, name, ranks = known
        return self._span(part, CommKey(name, op, count, ranks, -1))

    def message(self, op: str, count: int, peer: int) -> Span:
        """Return the span of sending `count` bytes to the rank `peer`, receiving them from it, or waiting for either."""
        return self._span(PIPELINE, CommKey("pipeline", op, count, 2, peer))

    def mark(self, what: Span | str | None) -> None:
        if not self._running:
            return
        if self._stream is None:
            self._marks.append((what, time.perf_counter_ns()))
        elif torch.cuda.current_stream() == self._stream:
            event = self._events.pop() if self._events else torch.cuda.Event(enable_timing=True)
            event.record(self._stream)
            self._marks.append((what, event))

    def _span(self, part: str, comm: CommKey | None) -> Span:
        span = self._spans.get((part, comm))
        if span is None:
            span = self._spans[part, comm] = Span(self, part, comm)
        return span

    def _describe(self, ranks: list[int]) -> tuple[str, str, int]:
        """Return (part, name, size) of a group of ranks."""
        coordinates = [rank_coordinates(self._coordinates, rank) for rank in ranks]
        axes = [
            axis
            for axis, column in zip(("pipeline", "data", "tensor"), zip(*coordinates, strict=True), strict=True)
            if len(set(column)) > 1
        ]
        # DeepSpeed reduces over its data ranks even where that is one
        parts = {("tensor",): TENSOR, ("data",): DATA_PARALLEL, (): DATA_PARALLEL}
        part = PIPELINE if "pipeline" in axes else parts.get(tuple(axes), ALL_RANKS)
        return part, " x ".join(axes) or "alone", len(ranks)

    def _read(self, marks: list[Mark]) -> list[tuple[Span | str | None, int]]:
        if self._stream is None:
            return marks
        first = marks[0][1]
        times = [(what, round(first.elapsed_time(event) * 1e6)) for what, event in marks]
        self._events += [event for _, event in marks]
        return times


CLOCK = Clock()


def account(marks: list[tuple[Span | str | None, int]], *, pipelined: bool) -> tuple[dict[str, int], dict[CommKey, list[int]]]:
    """Return (ns by part, comms) of one step's marks: each moment goes to the innermost open span, or to the loop's phase.

    A forward pass is a recomputation inside a backward pass. pipelined: count waiting before the first forward pass and after
    the last backward pass apart from the rest.
    """
    last_backward = 0
    if pipelined:
        whats = enumerate(what for what, _ in marks)
        last_backward = max((i for i, what in whats if type(what) is Span and what.part in (BACKWARD, WEIGHTS)), default=0)
    parts: dict[str, int] = dict.fromkeys(PARTS, 0)
    comms: dict[CommKey, list[int]] = defaultdict(lambda: [0, 0, 1 << 62])
    stack, begun, forwards, before = [OTHER], [], 0, marks[0][1]
    for index, (what, stamp) in enumerate(marks):
        parts[stack[-1]] += stamp - before
        before = stamp
        if what is None:
            stack.pop()
            span, began = begun.pop()
            if span.comm is not None:
                entry = comms[span.comm]
                entry[0], entry[1], entry[2] = entry[0] + 1, entry[1] + stamp - began, min(entry[2], stamp - began)
        elif type(what) is str:
            stack[0] = what
        else:
            part = what.part
            forwards += part == FORWARD
            if part == RECOMPUTE and BACKWARD not in stack:
                part = stack[-1]  # the first time round
            elif part == PIPELINE and pipelined:
                part = WARM_UP if not forwards else COOL_DOWN if index > last_backward else PIPELINE
            stack.append(part)
            begun.append((what, stamp))
    return parts, dict(comms)


def num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
