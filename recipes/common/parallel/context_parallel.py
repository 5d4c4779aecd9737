"""Adds context parallelism to unmodified Hugging Face decoders: data ranks that share sequences, each with a slice of them.

All but attention treats a token by itself, so it runs on the slice. Attention is the family's own, called through transformers'
table of attention functions with whole sequences and a part of the heads, between two all-to-alls (arXiv 2309.14509). The mask
function, from the other table, is asked for whole sequences, so windows, documents and causality stay the family's.

Where there are more context ranks than heads, `spans` of ranks divide the queries as well:

    context = 4 = 2 ranks that divide heads x 2 spans          rank 0   rank 1   rank 2   rank 3
    holds of the sequence                                      1st      2nd      3rd      4th quarter
    attends, after the all-to-all of 0-1 and of 2-3            ------ 1st half   2nd half ------
                                                               heads A  heads B  heads A  heads B
    keys and values, gathered between 0-2 and between 1-3      all      all      all      all
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from recipes.common.model.attention_tables import Attention, attach, attention_function
from recipes.common.model.document_bounds import sequence_indices
from recipes.common.model.varlen_attention import VARLEN, register, segments, window_of
from recipes.common.parallel.collectives import exchange, gather_sequence
from recipes.common.recipe import Layout

# attn_implementations whose masks are made for whole sequences, or that need none
SHAREABLE = ("sdpa", VARLEN, "eager", "flex_attention", "flash_attention_2", "flash_attention_3")
_BY_POSITIONS = ("flash_attention_2", "flash_attention_3")  # they take positions in place of a mask
SPANNING = ("sdpa", VARLEN, "eager", "flex_attention")  # whose masks may begin at a later query


def local_heads(config: PreTrainedConfig, tensor: int) -> tuple[int, int]:
    """Return the (query heads, key/value heads) of one of `tensor` ranks."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    return heads // tensor, max((getattr(text, "num_key_value_heads", None) or heads) // tensor, 1)


def divides_heads(ranks: int, heads: int, kv_heads: int) -> bool:
    """Return whether so many ranks can divide the heads: each has whole groups of them, key/value heads shared or not."""
    return heads % math.lcm(kv_heads, ranks) == 0


def ranks_that_divide(context: int, heads: int, kv_heads: int) -> tuple[int, ...]:
    """Return how many of `context` ranks may divide the heads, in order."""
    return tuple(n for n in divisors(context) if divides_heads(n, heads, kv_heads))


def divisors(number: int, most: int | None = None) -> list[int]:
    """Return the divisors of `number`, up to `most`."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    both = sorted({*small, *(number // n for n in small)})
    return [n for n in both if most is None or n <= most]


def head_ranks(config: PreTrainedConfig, layout: Layout) -> int:
    """Return how many of the context ranks divide the heads of a tensor rank: as many as the layout states, or as can."""
    if layout.context_heads or layout.context == 1:
        return layout.context_heads or 1
    return ranks_that_divide(layout.context, *local_heads(config, layout.tensor))[-1]


class ContextAttention:
    """Shares the attention of one stage over the context ranks. `attach` it to the model, then ask `places` in each forward."""

    def __init__(
        self,
        config: PreTrainedConfig,
        attention: str,
        *,
        size: int,
        rank: int,
        heads: int,
        head_group: dist.ProcessGroup | None = None,
        span_group: dist.ProcessGroup | None = None,
    ) -> None:
        """attention: the attn_implementation to share. heads: how many of the `size` ranks divide the heads."""
        self.attention, self.size, self.rank, self.heads = attention, size, rank, heads
        self.head_rank, self.spans, self.span = rank % heads, size // heads, rank // heads
        self._head_group, self._span_group = head_group, span_group
        self._config = copy.copy(config.get_text_config())  # flash attention asks it which kernel to run
        self._documents: torch.Tensor | None = None  # positions [seqs, whole length] that restart at each document

    def attach(self, causal: PreTrainedModel) -> None:
        if self.attention == VARLEN:
            register()
        attach(causal, self.attend, self.mask)

    def places(self, length: int, documents: torch.Tensor | None, device: torch.device) -> dict[str, torch.Tensor]:
        """Return the arguments by which the base model knows where its slice lies.

        length: of the slice. documents: positions [seqs, whole length] that restart at each document, if attention is to follow.
        """
        here = slice(self.rank * length, (self.rank + 1) * length)
        self._documents = documents
        if documents is None:
            return {"position_ids": torch.arange(here.start, here.stop, device=device).unsqueeze(0)}
        # a mask that hides nothing keeps transformers from reading bounds off a slice's positions: `mask` reads the whole's
        whole = torch.ones(documents.shape[0], length, dtype=torch.bool, device=device)
        return {"position_ids": documents[:, here].contiguous(), "attention_mask": whole}

    def mask(
        self,
        *,
        q_length: int,
        mask_function: Callable,
        allow_is_causal_skip: bool = True,
        **options: Any,
    ) -> Any:
        """Make the mask of this rank's queries and all keys, for a model that asks for its slice's."""
        whole = q_length * self.size
        queries = whole // self.spans
        if self.attention == VARLEN:
            of_all = {"seqs": options["batch_size"], "length": whole, "device": torch.device(options["device"])}
            part = {"spans": self.spans, "span": self.span}
            return segments(self._documents, window=window_of(options["config"], options), **of_all, **part)
        packed = sequence_indices(self._documents) if self._documents is not None else None
        if packed is not None:
            if self.attention in _BY_POSITIONS:
                return _Positions(self._documents)
            mask_function = _inside_documents(mask_function, self._documents, packed)
        options |= {"q_length": queries, "kv_length": whole, "q_offset": self.span * queries, "kv_offset": 0}
        return ALL_MASK_ATTENTION_FUNCTIONS[self.attention](
            mask_function=mask_function,
            allow_is_causal_skip=allow_is_causal_skip and packed is None and self.spans == 1,
            **options | {"attention_mask": None},
        )

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any = None,
        **options: Any,
    ) -> Attention:
        """Run the family's attention on [seqs, heads, slice, width], of which the other ranks hold the other slices."""
        heads = query.shape[1]
        query, key, value = self._to_heads(query, *shared_heads(key, value, heads=heads, ranks=self.heads))
        options["position_ids"] = None  # the slice's
        if isinstance(attention_mask, _Positions):
            options["position_ids"], attention_mask = attention_mask.whole, None
        out = attend_with_heads(
            self.attention, module, query, key, value, attention_mask, options,
            heads=heads, first=self.head_rank * query.shape[1], config=self._config,
        )  # fmt: skip
        return self._to_slice(out), None

    def _to_heads(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Exchange slices for heads, in one message, and gather keys and values, in another."""
        if self._head_group is not None:
            seqs, _, length, _ = tensors[0].shape
            # [ranks, seqs, heads of the rank, length, width]
            cut = [t.unflatten(1, (self.heads, -1)).transpose(0, 1) for t in tensors]
            sizes = [t[0].numel() for t in cut]
            whole = exchange(torch.cat([t.flatten(1) for t in cut], dim=1), self._head_group).split(sizes, dim=1)
            shapes = [(self.heads, seqs, -1, length, t.shape[-1]) for t in tensors]
            tensors = [w.view(shape).permute(1, 2, 0, 3, 4).flatten(2, 3) for w, shape in zip(whole, shapes, strict=True)]
        if self._span_group is None:
            return list(tensors)
        query, key, value = tensors
        widths = [t.shape[1] * t.shape[3] for t in (key, value)]
        both = torch.cat([t.transpose(1, 2).flatten(2) for t in (key, value)], dim=-1)
        gathered = gather_sequence(both, self._span_group, partial=True).split(widths, dim=-1)
        return [query, *(g.unflatten(2, (t.shape[1], -1)).transpose(1, 2) for g, t in zip(gathered, (key, value), strict=True))]

    def _to_slice(self, out: torch.Tensor) -> torch.Tensor:
        """Exchange heads for slices: [seqs, span, heads of this rank, width] -> [seqs, slice, heads, width]."""
        if self._head_group is None:
            return out
        seqs, _, heads, width = out.shape
        cut = out.unflatten(1, (self.heads, -1)).transpose(0, 1)
        whole = exchange(cut.flatten(1), self._head_group).view(self.heads, seqs, -1, heads, width)
        return whole.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _inside_documents(mask_function: Callable, positions: torch.Tensor, packed: torch.Tensor) -> Callable:
    """Keep attention inside documents as the installed transformers does; 5.17 does not count windows from a document's start."""
    if hasattr(masking_utils, "packed_sequence_compatibility_function"):
        return masking_utils.packed_sequence_compatibility_function(mask_function, positions, packed)
    return masking_utils.and_masks(mask_function, masking_utils.packed_sequence_mask_function(packed))


class _Positions:
    """Stands for a mask, for kernels that take positions: a layer hands it to its attention, also when it is recomputed."""

    def __init__(self, whole: torch.Tensor) -> None:
        self.whole = whole


class _PartOfHeads:
    """Stands for an attention module that has some of its heads: what depends on them is replaced, all else is the module's."""

    def __init__(self, module: nn.Module, **own: Any) -> None:
        self.__dict__.update(own, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def shared_heads(key: torch.Tensor, value: torch.Tensor, *, heads: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Repeat key/value heads [seqs, heads, length, width] just enough for `ranks` to divide them; autograd sums the copies."""
    kv_heads = key.shape[1]
    if not divides_heads(ranks, heads, kv_heads):
        raise ValueError(f"{heads} heads with {kv_heads} key/value heads cannot be divided between {ranks} context ranks")
    times = ranks // math.gcd(ranks, kv_heads)
    return (key, value) if times == 1 else (key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1))


def attend_with_heads(
    attention: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    options: dict[str, Any],
    *,
    heads: int,
    first: int,
    config: PreTrainedConfig,
) -> torch.Tensor:
    """Run the family's attention on query's heads, of the module's `heads` those from `first` on: [seqs, queries, heads, width].

    What has one value a head (sinks) is cut: parameters of the module itself, and arguments. config: names the kernel.
    """
    mine = slice(first, first + query.shape[1])

    def per_head(tensor: Any) -> bool:
        return torch.is_tensor(tensor) and tensor.ndim == 1 and tensor.numel() == heads

    own = {name: p[mine] for name, p in module.named_parameters(recurse=False) if per_head(p)}
    if hasattr(module, "num_key_value_groups"):
        own["num_key_value_groups"] = query.shape[1] // key.shape[1]
    part = _PartOfHeads(module, config=config, **own)
    options = {name: option[mine] if per_head(option) else option for name, option in options.items()}
    return attention_function(module, attention)(part, query, key, value, mask, **options)[0]
