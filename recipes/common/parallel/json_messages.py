"""Sends plain values between ranks as JSON in tensors: what arrives is data. torch's object collectives unpickle: that runs code.

Values are what JSON has; a tuple arrives as a list. Numbers arrive as they were, to the last bit; NaN and infinities too.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

LONGEST_BYTES = 1 << 28


def gather_json(value: Any, device: torch.device) -> list[Any]:
    """Return every rank's value, by rank, on every rank. Collective over all ranks."""
    if dist.get_world_size() == 1:
        return [json.loads(json.dumps(value))]
    own = _encode(value, device)
    lengths = [torch.empty(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([own.numel()], device=device))
    longest = max(_checked(length) for length in lengths)
    parts = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in lengths]
    dist.all_gather(parts, torch.nn.functional.pad(own, (0, longest - own.numel())))
    return [_decode(part[: int(length)]) for part, length in zip(parts, lengths, strict=True)]


def broadcast_json(value: Any, device: torch.device) -> Any:
    """Return rank 0's value on every rank; the others' is ignored. Collective over all ranks."""
    if dist.get_world_size() == 1:
        return json.loads(json.dumps(value))
    own = _encode(value if dist.get_rank() == 0 else None, device)
    length = torch.tensor([own.numel()], device=device)
    dist.broadcast(length, src=0)
    body = own if dist.get_rank() == 0 else torch.empty(_checked(length), dtype=torch.uint8, device=device)
    dist.broadcast(body, src=0)
    return _decode(body)


def _encode(value: Any, device: torch.device) -> torch.Tensor:
    body = bytearray(json.dumps(value).encode())
    assert len(body) <= LONGEST_BYTES, len(body)
    return torch.frombuffer(body, dtype=torch.uint8).to(device)


def _decode(body: torch.Tensor) -> Any:
    return json.loads(bytes(body.cpu().numpy()))


def _checked(length: torch.Tensor) -> int:
    """Return the length of a message, of another machine's making: refused before memory is taken for it."""
    found = int(length)
    if not 0 < found <= LONGEST_BYTES:
        raise RuntimeError(f"a message of {found} bytes between ranks: the ranks are not in step, or a stranger is in the group")
    return found
