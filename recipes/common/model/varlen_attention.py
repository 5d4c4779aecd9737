"""Adds attention="varlen": transformers' "sdpa" without the dense masks of documents, windows and later queries.

Where "sdpa" would be given a mask, the tokens of a micro batch are taken as segments, one after another, each of which is causal
and may have a window: torch's `varlen_attn` (torch 2.13), the flash kernel for such, computes them at once on a GPU in 16 bits.
What it cannot, and all on a CPU, is computed segment by segment by "sdpa". Where no mask is needed it is "sdpa". Nothing asks the
device: where segments begin is known on the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from recipes.common.model.attention_tables import Attention, attach
from recipes.common.model.decoder import PlanError
from recipes.common.model.document_bounds import find_bounds
from recipes.common.runtime.device_copies import to_device

VARLEN = "varlen"
WIDEST_HEAD, ALIGNED_HEAD = 256, 8  # elements of a head: of torch's flash kernels
_HALVES = (torch.bfloat16, torch.float16)


def built_as(attention: str) -> str:
    """Return the attn_implementation by which transformers builds a model for `attention`: what "sdpa" refuses is refused."""
    return "sdpa" if attention == VARLEN else attention


def kernel_refusal(dtype: torch.dtype, head_dim: int, value_dim: int, dropout: float = 0.0) -> str | None:
    """Say why torch's kernel for variable lengths cannot compute heads of these widths; None if it can, on a GPU."""
    if dropout:
        return "it drops no attention out"
    if dtype not in _HALVES:
        return f"it computes in 16 bits, not in {str(dtype).removeprefix('torch.')}"
    if head_dim != value_dim:
        return f"it needs equal widths of keys and values, not {head_dim} and {value_dim}"
    if head_dim > WIDEST_HEAD or head_dim % ALIGNED_HEAD:
        return f"it needs heads of a multiple of {ALIGNED_HEAD} up to {WIDEST_HEAD}, not {head_dim}"
    return None


@dataclass(frozen=True)
class Segments:
    """Stands for a mask: a layer hands it to its attention, also when it is recomputed.

    Segment i has the keys starts[i]:starts[i + 1] of all the sequences' keys one after another, and likewise of the queries. Its
    last query belongs to its last key. With one rank's part of the queries some segments have fewer queries than keys, or none.
    """

    query_starts: torch.Tensor  # int32 [segments + 1], on the device
    key_starts: torch.Tensor
    queries: tuple[int, ...]  # of each segment, known on the host
    keys: tuple[int, ...]
    first_query: int  # its place in the sequence
    window: int | None  # a query attends to so many keys, its own the last

    def rows(self, seqs: int, places: torch.Tensor, keys: int) -> torch.Tensor:
        """Return the dense mask's rows of the queries at `places` [n] of each sequence: bool [seqs, 1, n, keys]."""
        every = torch.arange(seqs * keys, dtype=torch.int32, device=places.device)
        segment = torch.searchsorted(self.key_starts, every, right=True).view(seqs, 1, keys)
        own = places + self.first_query
        distance = own.unsqueeze(1) - torch.arange(keys, device=places.device)
        near = (distance >= 0) & (distance < (self.window or keys))
        return (near & (segment == segment[:, 0, own].unsqueeze(2))).unsqueeze(1)


def segments(
    documents: torch.Tensor | None,
    *,
    seqs: int,
    length: int,
    device: torch.device,
    window: int | None,
    spans: int = 1,
    span: int = 0,
) -> Segments | None:
    """Return what stands for the mask of `seqs` sequences of `length`; None where causality is all of it.

    documents: positions [seqs, length] that restart at each document, if attention is to stay inside. spans, span: the queries
    are the span-th of so many equal parts of each sequence.
    """
    known = None if documents is None else find_bounds(documents)
    starts = np.arange(seqs + 1, dtype=np.int32) * length if known is None else known.host
    window = None if window is None or window >= np.diff(starts).max() else window
    if len(starts) == seqs + 1 and window is None and spans == 1:
        return None
    count, first = length // spans, span * (length // spans)
    if spans == 1:
        on_device = to_device(torch.from_numpy(starts), device) if known is None else known.starts
        lengths = tuple(np.diff(starts).tolist())
        return Segments(on_device, on_device, lengths, lengths, 0, window)
    ends = np.arange(seqs, dtype=np.int32) * length + first + count  # keys behind the last query are a segment without queries
    key_starts = np.unique(np.concatenate([starts, ends])).astype(np.int32)
    query_starts = (key_starts // length * count + np.clip(key_starts % length - first, 0, count)).astype(np.int32)
    both = to_device(torch.from_numpy(np.stack([query_starts, key_starts])), device)
    counts = (tuple(np.diff(each).tolist()) for each in (query_starts, key_starts))
    return Segments(*both.unbind(), *counts, first, window)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Segments | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> Attention:
    """Compute attention of [seqs, heads, length, width], key/value heads fewer or not, as transformers' "sdpa" would.

    Raises PlanError for what stands in a mask of the family's own, or is added to the scores.
    """
    if attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, None, dropout=dropout, scaling=scaling, **options)
    if not isinstance(attention_mask, Segments):
        raise PlanError(f"{type(module).__name__} makes a mask of its own")
    if options.get("softcap") is not None or options.get("position_bias") is not None:
        raise PlanError(f"{type(module).__name__} changes the scores by a soft cap or adds a bias to them")
    if not (getattr(module, "is_causal", True) if options.get("is_causal") is None else options["is_causal"]):
        raise PlanError(f"{type(module).__name__} is not causal")
    if query.is_cuda and kernel_refusal(query.dtype, query.shape[-1], value.shape[-1], dropout) is None:
        return _by_kernel(query, key, value, attention_mask, scaling), None
    return _by_segments(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling), None


def _by_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Segments, scaling: float | None
) -> torch.Tensor:
    """Compute all segments at once: [seqs, queries, heads, width]."""
    seqs = len(query)
    query, key, value = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    longest = (max(2, *each) for each in (mask.queries, mask.keys))  # one query a segment would be taken for decoding
    left = -1 if mask.window is None else mask.window - 1
    options = {"scale": scaling, "window_size": (left, 0), "enable_gqa": True}
    return varlen_attn(query, key, value, mask.query_starts, mask.key_starts, *longest, **options).unflatten(0, (seqs, -1))


def _by_segments(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Segments, **options: Any
) -> torch.Tensor:
    """Compute one segment after another: [seqs, queries, heads, width]. A window, or later queries, need a mask of its size."""
    seqs, counts = len(query), (mask.queries, mask.keys, mask.keys)
    flat = (t.transpose(1, 2).flatten(0, 1).split(count) for t, count in zip((query, key, value), counts, strict=True))
    out = []
    for parts in zip(*flat, strict=True):
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in parts)
        if q.shape[2]:
            rows = _rows(q.shape[2], k.shape[2], mask.window, q.device)
            out.append(sdpa_attention_forward(module, q, k, v, rows, is_causal=True, **options)[0].squeeze(0))
    return torch.cat(out).unflatten(0, (seqs, -1))


def _rows(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Return the mask bool [1, 1, queries, keys] of one segment; None where causality is all of it."""
    if queries == keys and (window is None or window >= keys):
        return None
    every = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return (every if window is None else every.triu(keys - queries - window + 1))[None, None]


class VarlenAttention:
    """The attention of a stage whose ranks have whole sequences. `attach` it to the model, then ask `places` in each forward."""

    def __init__(self) -> None:
        self._documents: torch.Tensor | None = None  # positions [seqs, length] that restart at each document

    def attach(self, causal: PreTrainedModel) -> None:
        register()
        attach(causal, self.attend, self.mask)

    def places(self, length: int, documents: torch.Tensor | None, device: torch.device) -> dict[str, torch.Tensor]:
        """Return what the base model must be told of the places of its tokens."""
        self._documents = documents
        return {} if documents is None else {"position_ids": documents}

    def mask(self, *, batch_size: int, q_length: int, device: torch.device, config: PreTrainedConfig, **options: Any) -> Any:
        window = window_of(config, options)
        return segments(self._documents, seqs=batch_size, length=q_length, device=torch.device(device), window=window)

    def attend(self, module: nn.Module, *args: Any, **options: Any) -> Attention:
        return ALL_ATTENTION_FUNCTIONS[VARLEN](module, *args, **options)  # where the monitor may stand between


def register() -> None:
    """Name `attend` in transformers' table, where context ranks and the monitor look it up."""
    ALL_ATTENTION_FUNCTIONS.register(VARLEN, attend)


def window_of(config: PreTrainedConfig, options: dict[str, Any]) -> int | None:
    """Return the window that transformers asks a mask for. options: of its mask function. Raises PlanError for any other mask."""
    if options.get("use_vmap") or getattr(config, "attention_chunk_size", None) is not None:
        raise PlanError(f"model_type={config.model_type} masks more than what is later or beyond a window")
    return options.get("local_size")
