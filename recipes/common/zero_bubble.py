"""The zero-bubble pipeline schedule ZB-H1 (arXiv 2401.10241, section 3.1) in DeepSpeed's pipeline engine.

A stage sends the input's gradient to the stage before it as soon as that is computed, and computes the weights' gradients
(`weight_queue`) where 1F1B would wait: the bubble of (stages - 1)(F + B + W) falls to (stages - 1)(F + B - W), where F, B and W
are the times of a micro batch's forward pass, input gradients and weight gradients. Activations in flight are 1F1B's; stage s
keeps in addition the factors of up to s micro batches' weight gradients. Results equal 1F1B's to the last bit.

Neighbours trade an activation for a gradient in one batched operation, both posting their trades in the same order: NCCL runs
the operations between two ranks one after the other and would deadlock where the orders differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine

from recipes.common.timers import BACKWARD, CLOCK, DATA, FORWARD, PIPELINE, WEIGHTS, size_of
from recipes.common.weight_queue import WeightQueue


class Forward(schedule.PipeInstruction):
    """Of `micro_batch`."""


class InputGradients(schedule.PipeInstruction):
    """Of `micro_batch`: the backward pass without what the queue puts off."""


class WeightGradients(schedule.PipeInstruction):
    """Of the micro batch that has waited longest."""


class TradeNext(schedule.PipeInstruction):
    """With the next stage: send the activation of micro batch `send`, receive the gradient of `receive`; None is nothing."""


class TradePrevious(schedule.PipeInstruction):
    """With the stage before: send the gradient of micro batch `send`, receive the activation of `receive`; None is nothing."""


class Settle(schedule.PipeInstruction):
    """Everything sent has left, and nothing waits."""


class ZeroBubbleSchedule(schedule.PipeSchedule):
    """One stage's instructions for one step. Communication is posted here and waited for by the pass that needs it."""

    def num_pipe_buffers(self) -> int:
        return self._ahead()

    def _ahead(self) -> int:
        """Forward passes before the first backward pass: the micro batches in flight, as in 1F1B."""
        return min(self.stages - self.stage_id, self.micro_batches)

    def passes(self) -> Iterator[tuple[str, int]]:
        """("F", "B" or "W", micro batch): stage s may owe the weight gradients of s micro batches, until the last forward."""
        ahead, made_up = self._ahead(), 0
        yield from (("F", i) for i in range(ahead))
        for i in range(self.micro_batches):
            yield "B", i
            if i + ahead >= self.micro_batches or i + 1 - made_up > self.stage_id:
                yield "W", made_up
                made_up += 1
            if i + ahead < self.micro_batches:
                yield "F", i + ahead
        yield from (("W", i) for i in range(made_up, self.micro_batches))

    def steps(self) -> Iterator[list[schedule.PipeInstruction]]:
        ahead, count = self.stages - self.stage_id, self.micro_batches
        for kind, i in self.passes():
            if kind == "W":
                yield [WeightGradients()]
            elif kind == "F":
                before = [TradePrevious(send=None, receive=i)] if i < ahead else []  # later ones came with a gradient sent
                due = i + 1 - ahead  # the gradient that the next stage can give once it has this activation's place
                yield [*before, Forward(micro_batch=i), TradeNext(send=i, receive=due if due >= 0 else None)]
            else:
                more = i + ahead < count
                # the last gradients are owed for no activation: they are asked for as soon as the one before is done
                first = [TradeNext(send=None, receive=0)] if i == 0 and ahead > count else []
                last = [TradeNext(send=None, receive=i + 1)] if i + ahead >= count and i + 1 < count else []
                trade = TradePrevious(send=i, receive=i + ahead if more else None)
                yield [*first, InputGradients(micro_batch=i), trade, *last]
        yield [Settle(), schedule.ReduceTiedGrads(), schedule.ReduceGrads(), schedule.OptimizerStep()]


@dataclass(frozen=True)
class _Links:
    """What is under way between this stage and its neighbours."""

    queue: WeightQueue
    # ("activation" or "gradient", micro batch) -> where it is received, and what to wait for
    expected: dict[tuple[str, int], tuple[torch.Tensor, list[dist.Work]]] = field(default_factory=dict)
    sent: list[tuple[torch.Tensor, list[dist.Work]]] = field(default_factory=list)  # kept alive until it has left


def use_zero_bubble(engine: PipelineEngine, queue: WeightQueue) -> None:
    """Make `engine` train by ZeroBubbleSchedule. Its linears must put off their weight gradients to `queue`.

    On the instance, because `deepspeed.initialize` chooses the engine's class. Evaluation keeps DeepSpeed's own schedule.
    """
    links = _Links(queue)
    ours: dict[type, Callable[..., None]] = {
        Forward: _forward,
        InputGradients: _input_gradients,
        WeightGradients: _weight_gradients,
        TradeNext: _trade_next,
        TradePrevious: _trade_previous,
        Settle: _settle,
    }
    engine._INSTRUCTION_MAP = type(engine)._INSTRUCTION_MAP | {kind: partial(run, links) for kind, run in ours.items()}
    engine._train_schedule = lambda: ZeroBubbleSchedule(engine.micro_batches, engine.num_stages, engine.stage_id)


def _forward(links: _Links, engine: PipelineEngine, micro_batch: int) -> None:
    buffer = micro_batch % engine.num_pipe_buffers
    if engine.is_first_stage() or engine.is_last_stage():
        with CLOCK.span(DATA):
            engine._exec_load_micro_batch(buffer)
    if not engine.is_first_stage():
        engine.pipe_buffers["inputs"][buffer] = _take(
            links, engine, engine.prev_stage, "activation", micro_batch
        ).requires_grad_()
    with CLOCK.span(FORWARD):
        engine._exec_forward_pass(buffer)


def _input_gradients(links: _Links, engine: PipelineEngine, micro_batch: int) -> None:
    # a tensor of its own for each micro batch: a residual stream's gradient, which the queue keeps, is the received one
    engine.grad_layer = None if engine.is_last_stage() else _take(links, engine, engine.next_stage, "gradient", micro_batch)
    links.queue.begin()
    with CLOCK.span(BACKWARD):
        engine._exec_backward_pass(micro_batch % engine.num_pipe_buffers)
    engine.grad_layer = None


def _weight_gradients(links: _Links, engine: PipelineEngine) -> None:
    engine._running_engine_backward = True  # else DeepSpeed's hooks take it for a backward pass of the user's
    try:
        with CLOCK.span(WEIGHTS):
            links.queue.make_up()
    finally:
        engine._running_engine_backward = False


def _trade_next(links: _Links, engine: PipelineEngine, send: int | None, receive: int | None) -> None:
    if engine.is_last_stage():
        return
    outputs = engine.pipe_buffers["outputs"]
    given = None if send is None else outputs[send % engine.num_pipe_buffers]
    if given is not None and engine.first_output_send:
        engine.first_output_send = False
        engine._send_tensor_meta(given, engine.next_stage)
    like = None if receive is None else outputs[receive % engine.num_pipe_buffers]
    wanted = None if like is None else torch.empty(like.shape, dtype=like.dtype, device=like.device)
    _trade(links, engine, engine.next_stage, given, wanted, ("gradient", receive))


def _trade_previous(links: _Links, engine: PipelineEngine, send: int | None, receive: int | None) -> None:
    if engine.is_first_stage():
        return
    given = None
    if send is not None:
        buffer = send % engine.num_pipe_buffers
        given, engine.pipe_buffers["inputs"][buffer] = engine.pipe_buffers["inputs"][buffer].grad, None
    if engine.pipe_recv_buf is None:
        engine.pipe_recv_buf = engine._recv_tensor_meta(engine.prev_stage)
    wanted = None if receive is None else torch.empty_like(engine.pipe_recv_buf)
    _trade(links, engine, engine.prev_stage, given, wanted, ("activation", receive))


def _trade(
    links: _Links,
    engine: PipelineEngine,
    stage: int,
    given: torch.Tensor | None,
    wanted: torch.Tensor | None,
    key: tuple[str, int | None],
) -> None:
    peer = engine.grid.stage_to_global(stage_id=stage)
    operations = [] if given is None else [dist.P2POp(dist.isend, given.detach().contiguous(), peer)]
    operations += [] if wanted is None else [dist.P2POp(dist.irecv, wanted, peer)]
    if not operations:
        return
    with CLOCK.message("isend" if given is not None else "irecv, posted", size_of(operations[0].tensor), peer):
        works = dist.batch_isend_irecv(operations)
    if wanted is not None:
        links.expected[key] = wanted, works
    links.sent[:] = [(tensor, under_way) for tensor, under_way in links.sent if not all(w.is_completed() for w in under_way)]
    if given is not None:
        links.sent.append((operations[0].tensor, works))


def _take(links: _Links, engine: PipelineEngine, stage: int, what: str, micro_batch: int) -> torch.Tensor:
    received, works = links.expected.pop((what, micro_batch))
    with CLOCK.message("irecv", size_of(received), engine.grid.stage_to_global(stage_id=stage)):
        for work in works:
            work.wait()
    return received


def _settle(links: _Links, engine: PipelineEngine) -> None:
    with CLOCK.span(PIPELINE):
        for _, works in links.sent:
            for work in works:
                work.wait()
    links.sent.clear()
    assert not links.queue and not links.expected, "the schedule left a gradient or a message behind"
