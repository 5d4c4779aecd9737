"""Copies from the host to a GPU without a wait: from pinned memory, and micro batches one ahead of their use.

A copy from memory that is not pinned keeps the host until all work before it is done, and the GPU then waits for the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

Tensors = tuple[torch.Tensor, ...]


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of the host on `device`; on a CPU itself. The host goes on at once: torch keeps the pinned copy alive."""
    if device.type != "cuda":
        return tensor.to(device)
    if not tensor.numel():
        return torch.empty_like(tensor, device=device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


class CopyAhead:
    """Copies tuples of tensors to a device, each while the one before it is in use, on a GPU in a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batches: Iterable[Tensors]) -> Iterator[Tensors]:
        """Yield `batches` on the device, in order. One more than was asked for is read and copied."""
        ahead: tuple[Tensors, torch.cuda.Event | None] | None = None
        for batch in batches:
            following = self._start(batch)
            if ahead is not None:
                yield self._arrived(*ahead)
            ahead = following
        if ahead is not None:
            yield self._arrived(*ahead)

    def _start(self, batch: Tensors) -> tuple[Tensors, torch.cuda.Event | None]:
        if self._stream is None:
            return tuple(to_device(tensor, self._device) for tensor in batch), None
        with torch.cuda.stream(self._stream):
            copies = tuple(to_device(tensor, self._device) for tensor in batch)
            return copies, self._stream.record_event()

    def _arrived(self, copies: Tensors, copied: torch.cuda.Event | None) -> Tensors:
        """Let the stream that computes wait for the copies; the host does not."""
        if copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(copied)
            for tensor in copies:
                tensor.record_stream(current)  # its memory belongs to the other stream
        return copies
