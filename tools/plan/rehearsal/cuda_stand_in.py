"""Stands in for torch.cuda and for what FakeTensors lack, while a rehearsal runs: one device that is never behind.

What waits on a real device (`synchronize` of the device, a stream or an event) tells the recorder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import transformers.masking_utils
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch

from recipes.common.model import initial_weights
from tools.plan.rehearsal.attention_kernels import attend
from tools.plan.rehearsal.cuda_operators import cuda_operators
from tools.plan.rehearsal.known_values import small, values
from tools.plan.rehearsal.recorder import Recorder

CAPABILITY = (9, 0)  # an H100's


class StandInStream:
    """A stream that is always done."""

    def __init__(self, *_: Any, wait: Callable[[str], None] | None = None, **__: Any) -> None:
        self.device, self.cuda_stream, self._wait = torch.device("cuda", 0), 0, wait

    def synchronize(self) -> None:
        if self._wait is not None:
            self._wait("stream.synchronize")

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or StandInEvent()

    def query(self) -> bool:
        return True


class StandInEvent:
    """An event that has happened."""

    wait_of: Callable[[str], None] | None = None

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0

    def synchronize(self) -> None:
        if self.wait_of is not None:
            self.wait_of("event.synchronize")


@contextlib.contextmanager
def fake_cuda(recorder: Recorder, memory_bytes: int, name: str) -> Iterator[FakeTensorMode]:
    """Let this process take FakeTensors on "cuda" for real ones, on a device with so much memory. Yields their mode, entered."""
    events = type("Event", (StandInEvent,), {"wait_of": staticmethod(recorder.wait)})
    streams = type("Stream", (StandInStream,), {})
    current = streams(wait=recorder.wait)
    properties = SimpleNamespace(total_memory=memory_bytes, name=name, major=9, minor=0, multi_processor_count=132)
    memory = recorder.memory
    answers: dict[str, Any] = {
        "is_available": lambda: True, "is_initialized": lambda: True, "_lazy_init": lambda: None, "init": lambda: None,
        "device_count": lambda: 8, "current_device": lambda: 0, "set_device": lambda device: None,
        "device": contextlib.nullcontext, "stream": contextlib.nullcontext, "Stream": streams, "Event": events,
        "current_stream": lambda device=None: current, "default_stream": lambda device=None: current,
        "synchronize": lambda device=None: recorder.wait("cuda.synchronize"), "is_current_stream_capturing": lambda: False,
        "get_device_capability": lambda device=None: CAPABILITY, "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: name, "is_bf16_supported": lambda *_, **__: True,
        "mem_get_info": lambda device=None: (memory_bytes - memory.now, memory_bytes), "memory_stats": lambda device=None: {},
        "memory_allocated": lambda device=None: memory.now, "max_memory_allocated": lambda device=None: memory.peak,
        "memory_reserved": lambda device=None: memory.now, "max_memory_reserved": lambda device=None: memory.peak,
        "reset_peak_memory_stats": lambda device=None: None, "empty_cache": lambda: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8), "set_rng_state": lambda state, device=None: None,
        "manual_seed": lambda seed: None, "manual_seed_all": lambda seed: None, "_is_in_bad_fork": lambda: False,
        "nvtx": SimpleNamespace(range_push=lambda message: 0, range_pop=lambda: 0),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for attribute, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, attribute, answer))
        for owner, attribute, stand_in in _replaced():
            stack.enter_context(mock.patch.object(owner, attribute, stand_in))
        stack.callback(torch.autograd.set_multithreading_enabled, torch.autograd.is_multithreading_enabled())
        torch.autograd.set_multithreading_enabled(False)  # a device's own thread would not see the modes
        stack.enter_context(cuda_operators())
        mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(recorder)
        yield mode


def _replaced() -> list[tuple[Any, str, Any]]:
    """Return (owner, attribute, stand-in) of what asks a FakeTensor for more than it has."""
    return [
        (FakeTensorMode, "avoid_device_init", property(lambda mode: True)),
        (F, "scaled_dot_product_attention", attend),
        (nn.Module, "_apply", _apply),
        (torch.Tensor, "numpy", _numpy),
        (initial_weights, "draw_shard", lambda seed, name, calls, whole, held: torch.ones(held.shape(whole))),
        (torch.Tensor, "record_stream", lambda tensor, stream: None),  # its memory is freed a little later than here
        (FakeTensor, "tolist", _tolist),
        (torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata),  # which tensors share memory is told by this
        # it calls every FakeTensor a sign of tracing, and then takes another path than on a device
        (transformers.masking_utils, "is_tracing", lambda tensor=None: False),
    ]


def _apply(self: nn.Module, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """Convert a module as with real tensors: a parameter stays the same object and gets other data."""
    for child in self.children() if recurse else ():
        child._apply(change)
    for parameter in self._parameters.values():
        if parameter is not None:
            with torch.no_grad():
                data = change(parameter.detach())
                if data.device != parameter.device or data.dtype != parameter.dtype:
                    parameter.data = data
                    parameter.fake_device = data.device
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = change(buffer)
    return self


_real_numpy = torch.Tensor.numpy


def _numpy(tensor: torch.Tensor, **options: Any) -> np.ndarray:
    if not isinstance(tensor, FakeTensor):
        return _real_numpy(tensor, **options)
    if tensor.device.type != "cpu":
        raise TypeError("a tensor on a device has no numpy(): call cpu() first")
    if small(tensor):
        with no_dispatch():
            return _real_numpy(values(tensor), **options)
    return np.broadcast_to(np.zeros((), dtype=_KINDS[tensor.dtype]), tuple(tensor.shape))


def _tolist(tensor: torch.Tensor) -> Any:
    host = values(tensor.cpu())  # which the recorder sees
    with no_dispatch():
        return host.tolist()


_KINDS = {
    torch.float32: np.float32, torch.float64: np.float64, torch.float16: np.float16, torch.int64: np.int64, torch.int32: np.int32,
    torch.uint8: np.uint8, torch.bool: np.bool_,
}  # fmt: skip
