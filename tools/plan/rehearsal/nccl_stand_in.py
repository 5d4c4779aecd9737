"""Stands in for NCCL: a process group of any size in one process, which sends nothing, records every message and holds it to
NCCL's rules.

A message is what all ranks of its group must agree on: operator, elements, dtype, reduction, root. `compare` plays the records of
all ranks of a small world against each other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.utils._mode_utils import no_dispatch

from tools.plan.rehearsal.known_values import healthy, set_values, small, values

NAME = "rehearsal"
_REDUCTIONS = ("SUM", "AVG", "MAX", "MIN", "PRODUCT")
_DTYPES = frozenset({
    torch.int8, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool,
})  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One collective call, or one side of a message between two ranks."""

    phase: str
    op: str
    ranks: tuple[int, ...]  # of the group
    dtype: str
    elements: int
    bytes: int  # of the whole: what is gathered, what is scattered
    detail: str  # the reduction or the root; "" where there is neither
    peer: int | None  # the other global rank of a send or a receive
    line: str
    beside: float = 0.0  # FLOPs that the rank computes between its start and the wait for it


class Traffic:
    """What one rank has sent and received, and which of NCCL's rules it has broken."""

    def __init__(self, line: Callable[[], str], wait: Callable[[str], None], computed: Callable[[], float]) -> None:
        """line: returns the line of source that is running. wait: is told that the host waits for the device. computed: returns
        the FLOPs so far."""
        self.calls: list[Call] = []
        self.broken: dict[str, int] = defaultdict(int)
        self.phase = "start"
        self.incoming: Callable[[torch.Tensor], torch.Tensor | None] = lambda tensor: None  # values of a received small tensor
        self.group_calls = 0  # of new_group, for whichever ranks
        self._line, self.wait, self._computed = line, wait, computed

    def record(
        self,
        op: str,
        group: StandInGroup,
        tensors: Sequence[torch.Tensor],
        whole: int,
        *,
        detail: str = "",
        peer: int | None = None,
    ) -> StandInWork:
        """whole: bytes of the largest side."""
        line = self._line()
        for tensor in tensors:
            self._check(op, tensor, line)
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
        if len(dtypes) > 1:
            self.broken[f"{op}: mixes {', '.join(dtypes)} at {line}"] += 1
        where = None if peer is None else group.ranks[peer]
        self.calls.append(Call(self.phase, op, group.ranks, dtypes[0], tensors[0].numel(), whole, detail, where, line))
        index, before = len(self.calls) - 1, self._computed()
        return StandInWork(lambda: self._awaited(index, before))

    def _awaited(self, index: int, before: float) -> None:
        self.calls[index] = replace(self.calls[index], beside=self._computed() - before)

    def _check(self, op: str, tensor: torch.Tensor, line: str) -> None:
        shape = tuple(tensor.shape)
        if tensor.device.type != "cuda":
            self.broken[f"{op}: a tensor {shape} on the {tensor.device.type} at {line}"] += 1
        if tensor.dtype not in _DTYPES:
            self.broken[f"{op}: dtype {tensor.dtype} at {line}"] += 1
        if not tensor.is_contiguous():
            self.broken[f"{op}: a tensor {shape} with strides {tensor.stride()}, not contiguous, at {line}"] += 1

    def uneven(self, op: str, whole: int, part: int, size: int) -> None:
        if whole != part * size:
            self.broken[f"{op}: {whole} elements are not {size} times {part} at {self._line()}"] += 1


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class StandInWork(dist._Work):
    """A message that has arrived."""

    def __init__(self, awaited: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._awaited: Callable[[], None] | None = awaited

    def wait(self, timeout: Any = None) -> bool:
        if self._awaited is not None:  # only the first wait counts
            self._awaited()
            self._awaited = None
        return True

    def is_completed(self) -> bool:
        return True


class StandInGroup(dist.ProcessGroup):
    """One group, by the methods that torch.distributed calls."""

    def __init__(self, rank: int, ranks: tuple[int, ...], traffic: Traffic) -> None:
        super().__init__(rank, len(ranks))
        self.ranks, self._traffic = ranks, traffic

    def getBackendName(self) -> str:  # noqa: N802 as torch spells it
        return NAME

    def allreduce(self, tensors: list[torch.Tensor], options: Any = None) -> dist.Work:
        given = getattr(options, "reduceOp", None)
        reduction = next((name for name in _REDUCTIONS if given == getattr(dist.ReduceOp, name)), "")
        return self._traffic.record("all_reduce", self, tensors, _bytes(tensors), detail=reduction)

    allreduce_coalesced = allreduce

    def reduce(self, tensors: list[torch.Tensor], options: Any) -> dist.Work:
        self._traffic.record("reduce", self, tensors, _bytes(tensors), detail=f"to {options.rootRank}")
        return StandInWork()

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> dist.Work:
        self._traffic.record("broadcast", self, tensors, _bytes(tensors), detail=f"from {options.rootRank}")
        return StandInWork()

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], options: Any = None) -> dist.Work:
        for output, own in zip(outputs, inputs, strict=True):
            self._traffic.record("all_gather", self, [own, *output], _bytes(output))
            for part in output:
                self._traffic.uneven("all_gather", part.numel(), own.numel(), 1)
                _copy_values(part, own)
        return StandInWork()

    def all_gather_single(self, output: torch.Tensor, own: torch.Tensor, options: Any = None) -> dist.Work:
        self._traffic.uneven("all_gather_into_tensor", output.numel(), own.numel(), self.size())
        work = self._traffic.record("all_gather_into_tensor", self, [own, output], _bytes([output]))
        if small(output):
            with no_dispatch():
                set_values(output, values(own).flatten().repeat(self.size()).reshape(output.shape))
        return work

    def all_gather_single_coalesced(self, outputs: list, inputs: list, options: Any = None) -> dist.Work:
        for output, own in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, own)
        return StandInWork()

    def reduce_scatter(self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], options: Any = None) -> dist.Work:
        for own, parts in zip(outputs, inputs, strict=True):
            self._traffic.record("reduce_scatter", self, [own, *parts], _bytes(parts))
        return StandInWork()

    def reduce_scatter_single(self, own: torch.Tensor, whole: torch.Tensor, options: Any = None) -> dist.Work:
        self._traffic.uneven("reduce_scatter_tensor", whole.numel(), own.numel(), self.size())
        return self._traffic.record("reduce_scatter_tensor", self, [own, whole], _bytes([whole]))

    def reduce_scatter_single_coalesced(self, outputs: list, inputs: list, options: Any = None) -> dist.Work:
        for own, whole in zip(outputs, inputs, strict=True):
            self.reduce_scatter_single(own, whole)
        return StandInWork()

    def all_to_all_single(
        self, output: torch.Tensor, own: torch.Tensor, output_sizes: list[int], input_sizes: list[int], options: Any = None
    ) -> dist.Work:
        if not input_sizes and len(own) % self.size():
            self._traffic.broken[f"all_to_all_single: {len(own)} rows over {self.size()} ranks"] += 1
        work = self._traffic.record("all_to_all_single", self, [own, output], _bytes([own]))
        if own.shape == output.shape:  # all send what this rank sends: counts of rows that follow stay possible
            _copy_values(output, own)
        return work

    def alltoall(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], options: Any = None) -> dist.Work:
        self._traffic.record("all_to_all", self, [*inputs, *outputs], _bytes(inputs))
        return StandInWork()

    def gather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], options: Any) -> dist.Work:
        self._traffic.record("gather", self, inputs, _bytes(inputs) * self.size(), detail=f"to {options.rootRank}")
        return StandInWork()

    def scatter(self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], options: Any) -> dist.Work:
        self._traffic.record("scatter", self, outputs, _bytes(outputs) * self.size(), detail=f"from {options.rootRank}")
        return StandInWork()

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int = 0) -> dist.Work:
        return self._traffic.record("send", self, tensors, _bytes(tensors), peer=peer)

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int = 0) -> dist.Work:
        work = self._traffic.record("recv", self, tensors, _bytes(tensors), peer=peer)
        for tensor in tensors:
            if small(tensor):
                told = self._traffic.incoming(tensor)
                set_values(tensor, healthy(tensor) if told is None else told)
        return work

    def barrier(self, opts: Any = None) -> dist.Work:
        self._traffic.wait("barrier")
        return StandInWork()

    # their names before torch 2.12
    _allgather_base, _reduce_scatter_base, alltoall_base = all_gather_single, reduce_scatter_single, all_to_all_single


def _copy_values(target: torch.Tensor, source: torch.Tensor) -> None:
    if small(target):
        with no_dispatch():
            set_values(target, values(source).clone())


def start_world(rank: int, world_size: int, traffic: Traffic) -> None:
    """Start torch.distributed with this stand-in as the world's backend and that of every later group."""

    def create(options: Any, _: Any) -> StandInGroup:
        ranks = tuple(options.global_ranks_in_group) or tuple(range(options.group_size))
        return StandInGroup(options.group_rank, ranks, traffic)

    new_group = distributed_c10d._new_group_with_tag

    def counted(*arguments: Any, **options: Any) -> Any:
        traffic.group_calls += 1
        return new_group(*arguments, **options)

    distributed_c10d._new_group_with_tag = counted  # in a process that does nothing else
    dist.Backend.register_backend(NAME, create, extended_api=True, devices=["cuda"])
    dist.init_process_group(NAME, store=dist.HashStore(), rank=rank, world_size=world_size)


def compare(by_rank: Sequence[Sequence[Call]]) -> list[str]:
    """Return where ranks of a group do not make the same calls in the same order. by_rank: records of every rank of a world."""
    problems = []
    collectives: dict[tuple[int, ...], dict[int, list[Call]]] = defaultdict(dict)
    links: dict[tuple, dict[bool, list[Call]]] = defaultdict(lambda: {True: [], False: []})
    for rank, messages in enumerate(by_rank):
        for message in messages:
            if message.peer is None:
                collectives[message.ranks].setdefault(rank, []).append(message)
            else:
                sends = message.op == "send"
                ends = (rank, message.peer) if sends else (message.peer, rank)
                links[ends, message.ranks][sends].append(message)
    for ranks, calls in collectives.items():
        first = min(ranks)
        for rank in ranks:
            problems += _different(f"group {list(ranks)}", calls.get(first, []), calls.get(rank, []), (first, rank))
    for ((source, target), ranks), sides in links.items():
        where = f"from rank {source} to rank {target} in group {list(ranks)}"
        problems += _different(where, sides[True], sides[False], (source, target))
    return problems


def _agreed(message: Call) -> tuple:
    op = "message" if message.peer is not None else message.op
    return message.phase, op, message.dtype, message.elements, message.detail


def _different(where: str, left: list[Call], right: list[Call], ranks: tuple[int, int]) -> list[str]:
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if _agreed(one) != _agreed(other):
            texts = (f"rank {rank} {_said(message)}" for rank, message in zip(ranks, (one, other), strict=True))
            return [f"{where}, call {index}: {', '.join(texts)}"]
    if len(left) != len(right):
        return [f"{where}: rank {ranks[0]} makes {len(left)} calls, rank {ranks[1]} {len(right)}"]
    return []


def _said(message: Call) -> str:
    detail = f" {message.detail}" if message.detail else ""
    return f"{message.op}{detail} of {message.elements} {message.dtype} in {message.phase} at {message.line}"
