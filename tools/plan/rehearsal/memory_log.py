"""Follows every allocation on the device, as the caching allocator would round it, and finds what was held at the peak."""

from __future__ import annotations

import weakref
from collections import defaultdict
from dataclasses import dataclass

import torch

from tools.plan.rehearsal.kernels import GRADIENT_SUMS, MONITOR, OPTIMIZER
from tools.plan.rehearsal.source_lines import LOSS as LOSS_PLACE
from tools.plan.rehearsal.source_lines import Origin

STATES, ACTIVATIONS, LOSS = "states", "activations", "loss"  # what memory is held for
_ROUNDED = 512  # bytes: the allocator's unit
_OF_STATES = (GRADIENT_SUMS, OPTIMIZER, MONITOR)  # what is allocated in a step and is no activation


@dataclass(frozen=True)
class Allocation:
    """One storage on the device."""

    size: int
    of: str  # STATES, LOSS or ACTIVATIONS
    line: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class HeldTensors:
    """Tensors of one kind that were held at the peak."""

    of: str
    line: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    bytes: int


class MemoryLog:
    """The device's memory in one process."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.building = True  # until the first step
        self._live: dict[int, Allocation] = {}
        self._events: list[tuple[int, Allocation, bool]] = []  # since the last `begin`: (key, what, whether it came)
        self._at_begin: dict[int, Allocation] = {}

    def knows(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._live

    def add(self, tensor: torch.Tensor, part: str, origin: Origin) -> None:
        """Count a tensor's storage, until it is freed. A storage counts once, by its first tensor. part: see kernels."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // _ROUNDED) * _ROUNDED
        if key in self._live or not size:
            return
        of = STATES if self.building or part in _OF_STATES else LOSS if origin.place == LOSS_PLACE else ACTIVATIONS
        dtype = str(tensor.dtype).removeprefix("torch.")
        self._live[key] = found = Allocation(size, of, origin.line, tuple(tensor.shape), dtype)
        self._events.append((key, found, True))
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key).atexit = False

    def _free(self, key: int) -> None:
        found = self._live.pop(key)
        self._events.append((key, found, False))
        self.now -= found.size

    def begin(self) -> None:
        """Look for the peak from here on."""
        self.peak, self.building = self.now, False
        self._events, self._at_begin = [], dict(self._live)

    def held_at_peak(self) -> list[HeldTensors]:
        """Return what was held at the peak since `begin`, the largest first."""
        live, now, most, last = dict(self._at_begin), sum(each.size for each in self._at_begin.values()), 0, 0
        most = now
        for index, (_, each, came) in enumerate(self._events, 1):
            now += each.size if came else -each.size
            if now > most:
                most, last = now, index
        assert most == self.peak, (most, self.peak)
        for key, each, came in self._events[:last]:
            if came:
                live[key] = each
            else:
                del live[key]
        kinds: dict[tuple, list[int]] = defaultdict(list)
        for each in live.values():
            kinds[each.of, each.line, each.shape, each.dtype].append(each.size)
        held = [
            HeldTensors(of=of, line=line, shape=shape, dtype=dtype, count=len(sizes), bytes=sum(sizes))
            for (of, line, shape, dtype), sizes in kinds.items()
        ]
        return sorted(held, key=lambda each: -each.bytes)
