"""Sends and receives what pipeline stages hand to each other, beside the computation.

Everything is sent as soon as it exists and received ahead of the pass that needs it. Messages to later ranks and to earlier ones
use two groups: within one, two ranks' messages arrive in the order in which they were sent, the receiver posts its receives in
that order, and the sender waits for nothing until the step's end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist

from recipes.common.parallel.grid import Grid
from recipes.common.pipeline.schedules import FORWARD, Message
from recipes.common.runtime.device_copies import to_device
from recipes.common.runtime.step_clock import CLOCK, PIPELINE, num_bytes

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SHAPE_NUMBERS = 8  # dtype, dimensions, their sizes; the rest is zeros


def shape_message(dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """Return what tells another stage the dtype and shape of messages to come."""
    numbers = [_DTYPES.index(dtype), len(shape), *shape]
    return torch.tensor(numbers + [0] * (_SHAPE_NUMBERS - len(numbers)))


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
        told = to_device(shape_message(tensor.dtype, tensor.shape), tensor.device)
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
