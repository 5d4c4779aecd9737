"""Answers transformers' question whether positions restart, which it asks the device: a wait in every forward pass.

With flash attention it asks in every layer. A run knows: without masked documents positions never restart, and with them they
are made on the host, from tokens (recipes.common.data.document_masking), where the answer costs nothing. Some families also look
for padding, to warn of it; training has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, masking_utils
from transformers import modeling_flash_attention_utils as flash

from recipes.common.runtime.device_copies import to_device

_PLACES = {  # function -> where it is looked up when it is called
    "find_packed_sequence_indices": masking_utils,
    "_is_packed_sequence": flash,
    "prepare_fa_kwargs_from_position_ids": flash,
    "warn_if_padding_and_no_attention_mask": PreTrainedModel,
}
_ASKED = {name: place for name, place in _PLACES.items() if hasattr(place, name)}  # another transformers may ask nothing


@dataclass(frozen=True)
class Bounds:
    """Where the documents of one micro batch begin, as flash attention wants it: of its sequences one after another."""

    several: bool  # whether a sequence holds more than one document
    host: np.ndarray  # int32 [documents + 1]; the last is the end
    starts: torch.Tensor  # the same, on the device
    longest: int


def positions_on(device: torch.device, positions: torch.Tensor) -> torch.Tensor:
    """Return document positions [seqs, length] of the host on `device`, with a note of their bounds."""
    starts = np.append(np.flatnonzero(positions.numpy() == 0), positions.numel()).astype(np.int32)
    copy = to_device(positions, device).view_as(positions)  # a tensor of its own, for its note
    bounds = to_device(torch.from_numpy(starts), device)
    copy.document_bounds = Bounds(len(starts) - 1 > len(positions), starts, bounds, int(np.diff(starts).max()))
    return copy


def find_bounds(positions: torch.Tensor) -> Bounds:
    """Return the bounds of document positions [seqs, length]; those without a note are asked, which waits for a device."""
    noted = getattr(positions, "document_bounds", None)
    return positions_on(positions.device, positions.cpu()).document_bounds if noted is None else noted


def sequence_indices(positions: torch.Tensor) -> torch.Tensor | None:
    """Return transformers' packed_sequence_mask: which document of its sequence a token is in; None for one document each."""
    bounds = getattr(positions, "document_bounds", None)
    if bounds is None:
        return masking_utils.find_packed_sequence_indices(positions)
    return _count_restarts(positions) if bounds.several else None


@contextmanager
def no_questions(*, documents: bool) -> Iterator[None]:
    """Let the passes within, forward and backward, ask no device about positions.

    documents: positions restart where their note says so, and those without a note (a family may change them on the way) are
    asked as ever. Else none restart.
    """
    theirs = {name: getattr(place, name) for name, place in _ASKED.items()}
    answers = _answers(theirs, documents)
    for name, place in _ASKED.items():
        setattr(place, name, answers[name])
    try:
        yield
    finally:
        for name, function in theirs.items():
            setattr(_ASKED[name], name, function)


def _answers(theirs: dict[str, Callable[..., Any]], documents: bool) -> dict[str, Callable[..., Any]]:
    def bounds_of(positions: torch.Tensor | None) -> Bounds | None:
        return getattr(positions, "document_bounds", None) if documents else None

    def find_indices(position_ids: torch.Tensor) -> torch.Tensor | None:
        if not documents:
            return None
        bounds = bounds_of(position_ids)
        if bounds is None:
            return theirs["find_packed_sequence_indices"](position_ids)
        return _count_restarts(position_ids) if bounds.several else None

    def is_packed(position_ids: torch.Tensor | None, batch_size: int) -> bool | torch.Tensor:
        if not documents:
            return False
        bounds = bounds_of(position_ids)
        return theirs["_is_packed_sequence"](position_ids, batch_size) if bounds is None else batch_size == 1 and bounds.several

    def flash_bounds(position_ids: torch.Tensor, *arguments: Any, **options: Any) -> tuple:
        bounds = bounds_of(position_ids)
        if bounds is None:
            return theirs["prepare_fa_kwargs_from_position_ids"](position_ids, *arguments, **options)
        return (bounds.starts, bounds.starts), (bounds.longest, bounds.longest)

    return dict(zip(_PLACES, (find_indices, is_packed, flash_bounds, lambda *_, **__: None), strict=True))


def _count_restarts(positions: torch.Tensor) -> torch.Tensor:
    return (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
