"""Packs tensors of any types and shapes into one floating-point tensor, bit for bit, and back, with their gradients.

A message between stages is one tensor, of whatever schedule: DeepSpeed's engine and ours send it, keep it and return its gradient
without knowing what is in it. Its bytes are

    header | member 0 | member 1 | ...        each at a multiple of 16 bytes, the rest zeros

where the header has 8 integers for each member (type, number of dimensions, sizes). Integers and fp32 in a bf16 message are bits
that nothing computes with; gradients of floating-point members lie at the same places in the message's gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.bool, torch.uint8)
_WORDS = 8  # of a member in the header
_ALIGNED = 16


@dataclass(frozen=True)
class Packing:
    """Where the members of a message lie."""

    members: tuple[tuple[torch.dtype, torch.Size], ...]
    leading: tuple[int, int]  # the message's first two dimensions: sequences, tokens
    starts: tuple[int, ...] = field(init=False)  # bytes
    num_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        starts, end = [], _aligned(8 * _WORDS * len(self.members))
        for dtype, shape in self.members:
            starts.append(end)
            end = _aligned(end + dtype.itemsize * shape.numel())
        object.__setattr__(self, "starts", tuple(starts))
        object.__setattr__(self, "num_bytes", end)

    def header(self) -> list[int]:
        words = []
        for dtype, shape in self.members:
            own = [_DTYPES.index(dtype), len(shape), *shape]
            words += own + [0] * (_WORDS - len(own))
        return words

    def width(self, dtype: torch.dtype) -> int:
        """Return the last dimension of a message of this type."""
        return -(-self.num_bytes // (self.leading[0] * self.leading[1] * dtype.itemsize))

    def views(self, message: torch.Tensor) -> list[torch.Tensor]:
        """Return the members as views of the message's memory."""
        raw = _bytes(message)
        return [
            raw.narrow(0, start, dtype.itemsize * shape.numel()).view(dtype).view(shape)
            for start, (dtype, shape) in zip(self.starts, self.members, strict=True)
        ]


def packing_of(tensors: tuple[torch.Tensor, ...], leading: tuple[int, int]) -> Packing:
    """Return the packing of these tensors. Raises ValueError for one that no message can hold."""
    for tensor in tensors:
        if tensor.dtype not in _DTYPES or tensor.ndim > _WORDS - 2:
            raise ValueError(f"a pipeline cannot hand on a tensor of type {tensor.dtype} with {tensor.ndim} dimensions")
    return Packing(tuple((tensor.dtype, tensor.shape) for tensor in tensors), leading)


def read_packing(message: torch.Tensor, members: int) -> Packing:
    """Return the packing that a message's header describes. It waits for the device."""
    words = _bytes(message.detach())[: 8 * _WORDS * members].view(torch.int64).tolist()
    rows = [words[start : start + _WORDS] for start in range(0, len(words), _WORDS)]
    found = tuple((_DTYPES[kind], torch.Size(sizes[:ndim])) for kind, ndim, *sizes in rows)
    return Packing(found, (message.shape[0], message.shape[1]))


def pack(packing: Packing, header: torch.Tensor, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the message [sequences, tokens, width] of the first tensor's type. header: the packing's, on the device."""
    return _Pack.apply(packing, header, *tensors)


def unpack(packing: Packing, message: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the members of a message."""
    return _Unpack.apply(packing, message)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packing: Packing, header: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.packing = packing
        return _filled(packing, header, tensors, tensors[0].dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        members = ctx.packing.views(gradient.contiguous())
        wanted = ctx.needs_input_grad[2:]
        return None, None, *(each if needed else None for each, needed in zip(members, wanted, strict=True))


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packing: Packing, message: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.packing, ctx.dtype = packing, message.dtype
        ctx.set_materialize_grads(False)
        # no views to autograd: a layer may overwrite its input, and every member has bytes of its own
        members = tuple(member.data for member in packing.views(message.contiguous()))
        ctx.mark_non_differentiable(*(member for member in members if not member.is_floating_point()))
        return members

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[None, torch.Tensor | None]:
        return None, _filled(ctx.packing, None, gradients, ctx.dtype)


def _filled(
    packing: Packing, header: torch.Tensor | None, tensors: tuple[torch.Tensor | None, ...], dtype: torch.dtype
) -> torch.Tensor:
    device = next(tensor.device for tensor in tensors if tensor is not None)
    message = torch.zeros(*packing.leading, packing.width(dtype), dtype=dtype, device=device)
    if header is not None:
        _bytes(message)[: 8 * header.numel()].view(torch.int64).copy_(header)
    for place, tensor in zip(packing.views(message), tensors, strict=True):
        if tensor is not None:
            place.copy_(tensor)
    return message


def _bytes(message: torch.Tensor) -> torch.Tensor:
    return message.view(-1).view(torch.uint8)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
