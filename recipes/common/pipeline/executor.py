"""Runs a pipeline schedule (`schedules`): the passes of a step or an evaluation, and their messages (`stage_messages`).

DeepSpeed's own engine, which runs 1F1B alone, computes nothing while a message is under way; here messages go beside the
computation. With a zero bubble, a backward pass computes the input's gradient and defers the weights'
(recipes.common.model.weight_grad_store) to a later pass. In all schedules the head's comes when the gradient of the last layers'
input is on its way. `streams` plays these programs: where each pair of ranks has a stream,
no schedule of ours deadlocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe import schedule as ds_schedule
from deepspeed.runtime.pipe.engine import PipelineEngine

from recipes.common.parallel.gradient_buckets import GradientBuckets
from recipes.common.parallel.grid import Grid
from recipes.common.pipeline.last_passes import Parameters, last_passes
from recipes.common.pipeline.schedules import FORWARD, INPUTS, Message, Pass, forward_passes, needs, order_passes, sent_messages
from recipes.common.pipeline.schedules import WEIGHTS as WEIGHTS_PASS
from recipes.common.pipeline.stage import Stage
from recipes.common.pipeline.stage_messages import Mailbox
from recipes.common.pipeline.streams import AHEAD
from recipes.common.runtime.step_clock import BACKWARD, CLOCK, DATA, WEIGHTS
from recipes.common.runtime.step_clock import FORWARD as FORWARD_TIME

Batch = tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]  # ids, labels (see Stage)


class RunPasses(ds_schedule.PipeInstruction):
    """Runs all passes of a step and waits for all messages."""


class OneStep(ds_schedule.PipeSchedule):
    """DeepSpeed's schedule of a step whose passes the executor runs."""

    def num_pipe_buffers(self) -> int:
        return 0  # DeepSpeed's own buffers stay unused

    def steps(self) -> Iterator[list[ds_schedule.PipeInstruction]]:
        yield [RunPasses(), ds_schedule.ReduceTiedGrads(), ds_schedule.ReduceGrads(), ds_schedule.OptimizerStep()]


class PipelineExecutor:
    """Runs one rank's passes, for DeepSpeed's engine in a training step and for an evaluation."""

    def __init__(self, engine: PipelineEngine, stage: Stage, grid: Grid) -> None:
        placement = stage.placement
        self._engine, self._stage, self._grid, self._placement = engine, stage, grid, placement
        self._order = cache(lambda count: self._own_part(order_passes(placement, count, stage.pass_costs)))
        self._own = placement.chunks_of(grid.pipeline_rank)
        self.buckets: GradientBuckets | None = None  # told which gradients are a step's last, where they reduce as they come
        self._last = cache(lambda count: last_passes(self._order(count)[0], self._own, stage))
        self._templates: dict[int, torch.Tensor] = {}
        self._told: set[int] = set()  # chunks whose rank knows the shape of what enters them
        self._clear()

    def _clear(self) -> None:
        self._kept: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}  # (micro batch, chunk) -> input and output
        self._local: dict[Message, torch.Tensor] = {}  # messages from one of this rank's chunks to another
        self._loaded: dict[int, Batch] = {}
        self._next_load = 0

    def train(self) -> None:
        count = self._engine.micro_batches
        self._run(*self._order(count), self._engine.data_iterator, {} if self.buckets is None else self._last(count))
        late = self._stage.head_sums.waiting or any(map(len, self._stage.weight_grad_stores))
        assert not self._kept and not late, "the schedule left a gradient behind"

    def evaluate(self, batches: Iterator[Batch], count: int) -> None:
        """Run the forward passes of `count` micro batches. The stage adds up their losses; DeepSpeed's next step trains again."""
        orders = [forward_passes(self._placement, rank, count) for rank in range(self._grid.pipeline)]
        self._stage.eval()
        with torch.no_grad():
            self._run(*self._own_part(orders), batches, {})

    def _own_part(self, orders: list[list[Pass]]) -> tuple[list[Pass], dict[int, tuple[Message, ...]]]:
        """Return this rank's passes, and the messages that each neighbour sends it, from the passes of all ranks."""
        here = self._grid.pipeline_rank
        incoming = {
            stage: tuple(message for to, message in sent_messages(orders[stage], self._placement) if to == here)
            for stage in self._placement.neighbours_of(here)
        }
        return orders[here], incoming

    def _run(
        self,
        order: list[Pass],
        incoming: dict[int, tuple[Message, ...]],
        batches: Iterator[Batch],
        last: dict[Pass, Parameters],
    ) -> None:
        self._clear()
        self._batches = batches
        mail = Mailbox(self._grid, incoming, self._templates)
        together = self._last_weight_passes(order)
        order = order[: len(order) - together] + order[len(order) - 1 :]
        for index, step in enumerate(order):
            for following in order[index : index + AHEAD + 1]:
                if (message := self._message(following)) is not None:
                    mail.post_receive(message, wait=following is step)
            at_once = self._at_once(step, order[index + 1 :]) if step in last else frozenset()
            if step in last:
                self.buckets.expect(self._without_deferred(last[step], step) | at_once)
            if step.kind == FORWARD:
                self._forward(step, mail)
            elif step.kind == INPUTS:
                self._backward(step, mail, at_once)
            else:
                self._weight_gradients(step, together if step is order[-1] else 1)
            if step in last:
                self.buckets.complete(self._without_deferred(last[step], step))
        mail.finish()
        assert not self._loaded, "the passes left a micro batch behind"

    def _last_weight_passes(self, order: list[Pass]) -> int:
        """Return how many passes at the end give one chunk weight gradients, so that they may run as one, layer by layer.

        The last layers have theirs then, and reduce them, while the first ones' are computed. At least 1, whatever ends.
        """
        count = 1
        while count < len(order) and order[-count - 1].kind == WEIGHTS_PASS and order[-count - 1].chunk == order[-1].chunk:
            count += 1
        stores = self._stage.weight_grad_stores
        known = bool(stores) and stores[self._own.index(order[-1].chunk)].all_have_sums()
        return count if known and order[-1].kind == WEIGHTS_PASS else 1

    def _at_once(self, step: Pass, following: list[Pass]) -> Parameters:
        """Return of which weights a backward pass need not defer the gradients: no rank waits for it, and they come next.

        Not the first micro batch's: the passes before show which weights' come from the store alone.
        """
        stores, weights = self._stage.weight_grad_stores, step._replace(kind=WEIGHTS_PASS)
        if not stores or step.kind != INPUTS or step.chunk or not step.micro_batch or not following or following[0] != weights:
            return frozenset()
        return frozenset() if len(stores[0]) else frozenset(stores[0].weights - self.buckets.visited)

    def _without_deferred(self, parameters: Parameters, step: Pass) -> Parameters:
        """Leave out those whose gradients are in a store after `step`, or come from it later, or after the head's input's."""
        if step.kind != INPUTS:
            return parameters
        stores = self._stage.weight_grad_stores
        return parameters.difference(self._stage.head_sums.waiting, *(store.weights for store in stores))

    def _message(self, step: Pass) -> Message | None:
        """Return what `step` needs from another rank, if anything."""
        before = needs(step, self._placement.count)
        if before is None or before.chunk in self._own:
            return None
        return Message(step.kind, step.micro_batch, step.chunk)

    def _forward(self, step: Pass, mail: Mailbox) -> None:
        _, i, chunk = step
        last = chunk == self._placement.count - 1
        with CLOCK.span(DATA):
            ids, labels = self._load(i) if chunk == 0 or last else (None, None)
        x = ids if chunk == 0 else self._receive(step, mail)
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

    def _backward(self, step: Pass, mail: Mailbox, at_once: Parameters) -> None:
        """Compute the gradient of a chunk's input, and those of its weights or what a later pass computes them from.

        at_once: weights whose gradients could be deferred, and are not.
        """
        _, i, chunk = step
        # a tensor of its own for each micro batch: a residual stream's gradient, which the store keeps, is the received one
        gradient = None if chunk == self._placement.count - 1 else self._receive(step, mail)
        x, out = self._kept.pop((i, chunk))
        stores = self._stage.weight_grad_stores
        if stores:
            stores[self._own.index(chunk)].begin()
        with CLOCK.span(BACKWARD), stores[0].at_once(at_once) if at_once else nullcontext():
            if gradient is None:
                DeepSpeedEngine.backward(self._engine, out)  # PipelineEngine's own refuses
            else:
                _backward_through(self._engine, out, gradient)
        if chunk:
            self._deliver(Message(INPUTS, i, chunk - 1), x.grad, mail)
        if gradient is None:
            with CLOCK.span(BACKWARD):
                self._stage.head_sums.finish()

    def _weight_gradients(self, step: Pass, micro_batches: int) -> None:
        self._engine._running_engine_backward = True  # else DeepSpeed's hooks take this for the user's own backward pass
        try:
            with CLOCK.span(WEIGHTS):
                self._stage.weight_grad_stores[self._own.index(step.chunk)].compute_oldest(micro_batches)
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
        target = self._placement.rank_of(message.chunk)
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
