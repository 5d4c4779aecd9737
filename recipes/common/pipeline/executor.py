"""Runs a zero-bubble schedule (`schedules`) in DeepSpeed's pipeline engine: passes, and the messages between them.

A backward pass computes the input's gradient and defers the weights' (recipes.common.model.weight_grad_store) to a later pass.
Everything is sent as soon as it exists and received ahead of the pass that needs it, beside the computation. Messages to later
ranks and to earlier ones use two groups: within one, two ranks' messages arrive in the order in which they were sent, the
receiver posts its receives in that order, and the sender waits for nothing until the step's end. `streams` plays these programs:
where each pair of ranks has a stream, no schedule of ours deadlocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import cache

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe import schedule as ds_schedule
from deepspeed.runtime.pipe.engine import PipelineEngine

from recipes.common.config.placement import chunk_count, chunks_of_rank, rank_of_chunk
from recipes.common.parallel.grid import Grid
from recipes.common.pipeline.schedules import FORWARD, INPUTS, Message, Pass, forward_passes, needs, order_passes, sent_messages
from recipes.common.pipeline.stage import Stage
from recipes.common.pipeline.streams import AHEAD
from recipes.common.runtime.step_clock import BACKWARD, CLOCK, DATA, PIPELINE, WEIGHTS, num_bytes
from recipes.common.runtime.step_clock import FORWARD as FORWARD_TIME

Batch = tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]  # ids, labels (see Stage)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SHAPE_NUMBERS = 8  # dtype, dimensions, their sizes; the rest is zeros


class RunPasses(ds_schedule.PipeInstruction):
    """Runs all passes of a step and waits for all messages."""


class OneStep(ds_schedule.PipeSchedule):
    """DeepSpeed's schedule of a step whose passes the executor runs."""

    def num_pipe_buffers(self) -> int:
        return 0  # DeepSpeed's own buffers stay unused

    def steps(self) -> Iterator[list[ds_schedule.PipeInstruction]]:
        yield [RunPasses(), ds_schedule.ReduceTiedGrads(), ds_schedule.ReduceGrads(), ds_schedule.OptimizerStep()]


class Mailbox:
    """Sends and receives this rank's messages of one round of passes."""

    def __init__(self, grid: Grid, incoming: dict[int, tuple[Message, ...]], templates: dict[int, torch.Tensor]) -> None:
        """incoming: by sending stage, its messages to this rank in order. templates: of the messages between a chunk and the one
        before it, activations and gradients, by that chunk; they are added as they become known.
        """
        self._templates, self._grid = templates, grid
        self._incoming = {stage: deque(messages) for stage, messages in incoming.items()}  # those without a receive yet
        self._sender = {message: stage for stage, messages in incoming.items() for message in messages}
        self._receiving: dict[Message, tuple[torch.Tensor, dist.Work]] = {}
        self._sending: list[tuple[torch.Tensor, dist.Work]] = []  # the tensors are kept alive until they are sent

    def post_receive(self, message: Message, *, wait: bool) -> None:
        """Receive `message`, and what its sender sends before it, beside the computation. A second call does nothing.

        wait: for shapes that are not known yet; else what has such a shape, and what comes after it, is left to a later call.
        """
        stage = self._sender[message]
        source, group = self._grid.rank_of_stage(stage), self._group(downward=stage < self._grid.pipeline_rank)
        while message not in self._receiving and message in self._incoming[stage]:
            cut = _cut(self._incoming[stage][0])
            if cut not in self._templates:
                if not wait:
                    return
                self._templates[cut] = self._receive_shape(source, group)
            tensor = torch.empty_like(self._templates[cut])
            work = dist.irecv(tensor, source, group=group)
            self._receiving[self._incoming[stage].popleft()] = tensor, work

    def _receive_shape(self, source: int, group: dist.ProcessGroup | None) -> torch.Tensor:
        told = torch.empty(_SHAPE_NUMBERS, dtype=torch.long, device=self._grid.device)
        dist.recv(told, source, group=group)
        dtype, ndim, *sizes = told.tolist()
        return torch.empty(sizes[:ndim], dtype=_DTYPES[dtype], device=self._grid.device)

    def send_shape(self, stage: int, tensor: torch.Tensor) -> None:
        """Tell the shape of an activation before the first of its kind is sent."""
        numbers = [_DTYPES.index(tensor.dtype), tensor.ndim, *tensor.shape]
        told = torch.tensor(numbers + [0] * (_SHAPE_NUMBERS - len(numbers)), device=tensor.device)
        dist.send(told, self._grid.rank_of_stage(stage), group=self._group(downward=stage > self._grid.pipeline_rank))

    def _group(self, *, downward: bool) -> dist.ProcessGroup | None:
        return self._grid.down_group if downward else self._grid.up_group

    def wait_for(self, message: Message) -> torch.Tensor:
        tensor, work = self._receiving.pop(message)
        with CLOCK.message("irecv", num_bytes(tensor), self._grid.rank_of_stage(self._sender[message])):
            work.wait()
        return tensor

    def send(self, stage: int, tensor: torch.Tensor) -> None:
        tensor = tensor.detach().contiguous()
        target = self._grid.rank_of_stage(stage)
        with CLOCK.message("isend", num_bytes(tensor), target):
            work = dist.isend(tensor, target, group=self._group(downward=stage > self._grid.pipeline_rank))
        self._sending = [(kept, under_way) for kept, under_way in self._sending if not under_way.is_completed()]
        self._sending.append((tensor, work))

    def finish(self) -> None:
        """Wait until everything is sent, and check that everything was received."""
        with CLOCK.span(PIPELINE):
            for _, work in self._sending:
                work.wait()
        self._sending.clear()
        assert not any(self._incoming.values()) and not self._receiving, "the schedule left a message behind"


def _cut(message: Message) -> int:
    """Return the chunk that begins where a message crosses from one chunk to another."""
    return message.chunk if message.kind == FORWARD else message.chunk + 1


class PipelineExecutor:
    """Runs one rank's passes, for DeepSpeed's engine in a training step and for an evaluation."""

    def __init__(self, engine: PipelineEngine, stage: Stage, grid: Grid) -> None:
        schedule = stage.schedule
        self._engine, self._stage, self._grid, self._schedule = engine, stage, grid, schedule
        self._order = cache(lambda count: self._own_part(order_passes(schedule, grid.pipeline, count, stage.pass_costs)))
        self._chunks = chunk_count(schedule, grid.pipeline)
        self._own = chunks_of_rank(schedule, grid.pipeline, grid.pipeline_rank)
        self._templates: dict[int, torch.Tensor] = {}
        self._told: set[int] = set()  # chunks whose rank knows the shape of what enters them
        self._clear()

    def _clear(self) -> None:
        self._kept: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}  # (micro batch, chunk) -> input and output
        self._local: dict[Message, torch.Tensor] = {}  # messages from one of this rank's chunks to the other
        self._loaded: dict[int, Batch] = {}
        self._next_load = 0

    def train(self) -> None:
        self._run(*self._order(self._engine.micro_batches), self._engine.data_iterator)
        assert not self._kept and not any(map(len, self._stage.weight_grad_stores)), "the schedule left a gradient behind"

    def evaluate(self, batches: Iterator[Batch], count: int) -> None:
        """Run the forward passes of `count` micro batches. The stage adds up their losses; DeepSpeed's next step trains again."""
        orders = [forward_passes(self._schedule, self._grid.pipeline, rank, count) for rank in range(self._grid.pipeline)]
        self._stage.eval()
        with torch.no_grad():
            self._run(*self._own_part(orders), batches)

    def _own_part(self, orders: list[list[Pass]]) -> tuple[list[Pass], dict[int, tuple[Message, ...]]]:
        """Return this rank's passes, and the messages that each neighbour sends it, from the passes of all ranks."""
        here, pipeline = self._grid.pipeline_rank, self._grid.pipeline
        incoming = {
            stage: tuple(message for to, message in sent_messages(orders[stage], self._schedule, pipeline) if to == here)
            for stage in (here - 1, here + 1)
            if 0 <= stage < pipeline
        }
        return orders[here], incoming

    def _run(self, order: list[Pass], incoming: dict[int, tuple[Message, ...]], batches: Iterator[Batch]) -> None:
        self._clear()
        self._batches = batches
        mail = Mailbox(self._grid, incoming, self._templates)
        run = {FORWARD: self._forward, INPUTS: self._input_gradients}
        for index, step in enumerate(order):
            for following in order[index : index + AHEAD + 1]:
                if (message := self._message(following)) is not None:
                    mail.post_receive(message, wait=following is step)
            if step.kind in run:
                run[step.kind](step, mail)
            else:
                self._weight_gradients(step)
        mail.finish()

    def _message(self, step: Pass) -> Message | None:
        """Return what `step` needs from another rank, if anything."""
        before = needs(step, self._chunks)
        if before is None or before.chunk in self._own:
            return None
        return Message(step.kind, step.micro_batch, step.chunk)

    def _forward(self, step: Pass, mail: Mailbox) -> None:
        _, i, chunk = step
        with CLOCK.span(DATA):
            ids, labels = self._load(i) if self._stage.is_first or self._stage.is_last else (None, None)
        x = ids if chunk == 0 else self._receive(step, mail)
        last = chunk == self._chunks - 1
        with CLOCK.span(FORWARD_TIME):
            out = self._stage(x, labels if last else None, self._own.index(chunk))
        if torch.is_grad_enabled():
            self._kept[i, chunk] = x, out
        if last or not self._stage.is_last:
            self._loaded.pop(i, None)
        if not last:
            if chunk + 1 not in self._templates:
                self._templates[chunk + 1] = torch.empty_like(out, memory_format=torch.contiguous_format)
            self._deliver(Message(FORWARD, i, chunk + 1), out, mail)

    def _input_gradients(self, step: Pass, mail: Mailbox) -> None:
        _, i, chunk = step
        # a tensor of its own for each micro batch: a residual stream's gradient, which the store keeps, is the received one
        gradient = None if chunk == self._chunks - 1 else self._receive(step, mail)
        x, out = self._kept.pop((i, chunk))
        self._stage.weight_grad_stores[self._own.index(chunk)].begin()
        with CLOCK.span(BACKWARD):
            if gradient is None:
                DeepSpeedEngine.backward(self._engine, out)  # PipelineEngine's own refuses
            else:
                _backward_through(self._engine, out, gradient)
        if chunk:
            self._deliver(Message(INPUTS, i, chunk - 1), x.grad, mail)

    def _weight_gradients(self, step: Pass) -> None:
        self._engine._running_engine_backward = True  # else DeepSpeed's hooks take this for the user's own backward pass
        try:
            with CLOCK.span(WEIGHTS):
                self._stage.weight_grad_stores[self._own.index(step.chunk)].compute_oldest()
        finally:
            self._engine._running_engine_backward = False

    def _load(self, micro_batch: int) -> Batch:
        while self._next_load <= micro_batch:
            self._loaded[self._next_load] = next(self._batches)
            self._next_load += 1
        return self._loaded[micro_batch]

    def _receive(self, step: Pass, mail: Mailbox) -> torch.Tensor:
        message = Message(step.kind, step.micro_batch, step.chunk)
        tensor = self._local.pop(message) if message in self._local else mail.wait_for(message)
        return tensor.requires_grad_(torch.is_grad_enabled()) if step.kind == FORWARD else tensor

    def _deliver(self, message: Message, tensor: torch.Tensor, mail: Mailbox) -> None:
        target = rank_of_chunk(self._schedule, self._grid.pipeline, message.chunk)
        if target == self._grid.pipeline_rank:
            self._local[message] = tensor.detach()
            return
        if message.kind == FORWARD and message.chunk not in self._told:
            self._told.add(message.chunk)
            mail.send_shape(target, tensor)
        mail.send(target, tensor)


def _backward_through(engine: PipelineEngine, out: torch.Tensor, gradient: torch.Tensor) -> None:
    """Run a backward pass as the engine does on stages that have no loss."""
    if engine.using_bf16_optimizer:
        engine.optimizer.clear_lp_grads()
    engine._running_engine_backward = True
    try:
        out.backward(gradient=gradient)
    finally:
        engine._running_engine_backward = False
