"""Records every operator of a rehearsed step: memory by line, kernels by part, and each time the host waits for the device."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tools.plan.rehearsal import known_values
from tools.plan.rehearsal.kernels import flops, moved_bytes, part_of, starts_kernel
from tools.plan.rehearsal.known_values import tensors_in
from tools.plan.rehearsal.memory_log import MemoryLog
from tools.plan.rehearsal.source_lines import Origin, SourceLines


@dataclass
class Kernels:
    """Kernels of one kind."""

    kernels: int = 0
    bytes: int = 0
    flops: float = 0.0


@dataclass
class Records:
    """What one phase did."""

    waits: Counter[tuple[str, str]] = field(default_factory=Counter)  # (what, line)
    work: dict[tuple[str, str, str, str], Kernels] = field(
        default_factory=lambda: defaultdict(Kernels)
    )  # (part, line, op, place)


class Recorder(TorchDispatchMode):
    """Sees each operator before FakeTensorMode does; enter it inside that."""

    def __init__(self) -> None:
        super().__init__()
        self.lines, self.memory = SourceLines(), MemoryLog()
        self.records = Records()
        self.flops = 0.0  # of all phases
        self.unanswered: Counter[str] = Counter()  # where a value that nobody knows decided how many elements follow
        self._pinned: set[int] = set()  # storages

    def wait(self, what: str) -> None:
        """The host waits for the device, here."""
        self.records.waits[what, self.lines.here()] += 1

    def begin(self) -> Records:
        """Begin a phase. Returns its records."""
        self.records = Records()
        self.lines.forget_nodes()
        self.memory.begin()
        return self.records

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.rpartition("::")[2]
        inputs = tensors_in(args, kwargs)
        if name in _ANSWERS:
            return _ANSWERS[name](self, func, args, kwargs)
        on_device = any(each.device.type == "cuda" for each in inputs)
        if _depends_on_data(func, args, kwargs):
            return self._data_dependent(func, name, args, kwargs, on_device)
        for each in inputs:
            if isinstance(each, FakeTensor):
                each.constant = None  # FakeTensorMode's own idea of a value: its twin knows better
        out = func(*args, **_unpinned(kwargs))
        outputs = tensors_in(out)
        known_values.follow(func, name, args, kwargs, inputs, outputs)
        self._watch_copies(name, args, kwargs, inputs, outputs)
        if on_device or any(each.device.type == "cuda" for each in outputs):
            self._count(func, name, args, kwargs, inputs, outputs, out)
        return out

    def _count(
        self, func: Any, name: str, args: tuple, kwargs: dict, inputs: list[torch.Tensor], outputs: list[torch.Tensor], out: Any
    ) -> None:
        kernel = starts_kernel(func, name)
        new = [each for each in outputs if each.device.type == "cuda" and not self.memory.knows(each)]
        if not kernel and not new:
            if torch.is_grad_enabled():
                self.lines.origin()  # a view's node, too, has a line
            return
        origin: Origin = self.lines.origin()
        count = flops(func, name, args, kwargs, out) if kernel else 0.0
        part = part_of(name, count, origin)
        if kernel:
            work = self.records.work[part, origin.line, name, origin.place]
            work.kernels += 1
            work.bytes += moved_bytes(func, name, inputs, outputs)
            work.flops += count
            self.flops += count
        for each in new:
            self.memory.add(each, part, origin)

    def _watch_copies(
        self, name: str, args: tuple, kwargs: dict[str, Any], inputs: list[torch.Tensor], outputs: list[torch.Tensor]
    ) -> None:
        """Record copies between host and device that the host waits for, or may."""
        if kwargs.get("pin_memory") or name == "_pin_memory":
            self._pinned |= {each.untyped_storage()._cdata for each in outputs}
        if name == "copy_":
            target, source = inputs[0], inputs[1]
            asynchronous = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        elif name == "_to_copy" and inputs and outputs:
            target, source, asynchronous = outputs[0], inputs[0], kwargs.get("non_blocking", False)
        else:
            return
        here, there = source.device.type, target.device.type
        if here == there or "meta" in (here, there):
            return
        host = source if here == "cpu" else target
        pinned = host.untyped_storage()._cdata in self._pinned
        if not asynchronous:
            self.wait(f"copy from {_NAMES[here]} to {_NAMES[there]}")
        elif not pinned:
            self.wait(f"copy from {_NAMES[here]} to {_NAMES[there]}, of memory that is not pinned")

    def _data_dependent(self, func: Any, name: str, args: tuple, kwargs: dict[str, Any], on_device: bool) -> Any:
        """Answer an operator whose result, or its size, depends on values."""
        if on_device:
            self.wait(name)
        inputs = tensors_in(args, kwargs)
        found = known_values.compute(func, args, kwargs) if all(map(known_values.small, inputs)) else None
        if found is None:
            if name == "equal":
                return True
            self.unanswered[self.lines.here()] += 1
            rows = args[0].ndim if name == "nonzero" else 0
            return args[0].new_empty((0, rows) if rows else (0,), dtype=torch.int64 if rows else args[0].dtype)
        if not isinstance(found, torch.Tensor):
            return found
        device = inputs[0].device
        out = torch.empty_strided(found.shape, found.stride(), dtype=found.dtype, device=device)
        known_values.set_values(out, found)
        return out

    def _scalar(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if args[0].device.type == "cuda":
            self.wait("item")
        return known_values.scalar(args[0])

    def _is_pinned(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
        return args[0].untyped_storage()._cdata in self._pinned

    def _pin(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        pinned = args[0].clone()
        if known_values.small(pinned) and (found := known_values.known(args[0])) is not None:
            known_values.set_values(pinned, found)
        self._pinned.add(pinned.untyped_storage()._cdata)
        return pinned


_NAMES = {"cpu": "host", "cuda": "device"}
_ANSWERS = {
    "_local_scalar_dense": Recorder._scalar,
    "is_pinned": Recorder._is_pinned,
    "_pin_memory": Recorder._pin,
}


def _unpinned(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != "pin_memory"} if kwargs.get("pin_memory") else kwargs


def _depends_on_data(func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Return whether values decide an operator's result on the host, or its size; of `x[index]` only where that is a mask, of
    `repeat_interleave` where it is not told."""
    if func._overloadpacket is torch.ops.aten.repeat_interleave and kwargs.get("output_size") is not None:
        return False
    if func._overloadpacket is torch.ops.aten.index:
        return any(isinstance(each, torch.Tensor) and each.dtype in (torch.bool, torch.uint8) for each in args[1])
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
