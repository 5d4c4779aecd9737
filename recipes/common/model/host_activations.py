"""Keeps in the host's memory what recomputed layers save between the passes: their inputs.

On a GPU copies run beside the computation, in a stream of their own: to the host while the next layers compute, and back one
layer ahead of the backward pass. The bits do not change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SMALLEST_BYTES = 1 << 14  # less is not worth a copy


class HostActivations:
    """The copies of one rank's layer inputs, by micro batch."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._last: _Kept | None = None  # of the layer before, in this forward pass

    def keep_inputs(self, layer: nn.Module, *, first: bool) -> None:
        """Let the input of a recomputed layer wait on the host. first: of consecutive layers. Call it after `recompute`."""
        forward = layer.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            if first:
                self._last = None
            if not args:  # only what comes by position is saved through autograd, where it can be exchanged
                args = (kwargs.pop("hidden_states"),)
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                return forward(*args, **kwargs)

        layer.forward = run

    def _pack(self, saved: torch.Tensor) -> torch.Tensor | _Kept:
        if not saved.is_floating_point() or saved.numel() * saved.element_size() < SMALLEST_BYTES:
            return saved
        if saved.is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(saved.device)
        self._last = _Kept(saved, self._last, self._stream)
        return self._last

    def _unpack(self, saved: torch.Tensor | _Kept) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        whole = saved.take()
        if saved.before is not None:  # what the backward pass needs next
            saved.before.fetch()
            saved.before = None
        return whole


class _Kept:
    """One tensor on the host."""

    def __init__(self, source: torch.Tensor, before: _Kept | None, stream: torch.cuda.Stream | None) -> None:
        self.before, self._stream, self._device = before, stream, source.device
        self._back: torch.Tensor | None = None
        if stream is None:
            self._host = source.detach().clone()
            return
        self._host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(stream):
            self._host.copy_(source.detach(), non_blocking=True)
        source.record_stream(stream)

    def fetch(self) -> None:
        """Start the copy back."""
        if self._back is not None:
            return
        if self._stream is None:
            self._back = self._host
            return
        with torch.cuda.stream(self._stream):
            self._back = self._host.to(self._device, non_blocking=True)

    def take(self) -> torch.Tensor:
        """Wait for the copy back, and return it."""
        self.fetch()
        back, self._back = self._back, None
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            back.record_stream(current)
        return back
