"""Counts what context parallelism adds to a layer: keys and values that several ranks hold, messages, an uneven mask."""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import PreTrainedConfig

from recipes.common.parallel.context_parallel import head_ranks, local_heads
from recipes.common.recipe import Layout

_COPIES = 4.5  # of an element: laid out for the message, and taken from it, each read and written; some once more (rehearsed)


@dataclass(frozen=True, kw_only=True)
class ContextCost:
    """A layer's costs on one rank, in elements of one sequence."""

    kept: float = 0.0  # beside the rank's share of what one rank would keep
    sent: float = 0.0  # in a forward pass; a backward pass sends as many gradients
    copied: float = 0.0  # around that: read or written in a forward pass, and as many in a backward pass
    work: float = 1.0  # attention's, of the rank with the most, as a multiple of the mean of causal attention


def context_cost(config: PreTrainedConfig, layout: Layout, seq_len: int, head_dim: int) -> ContextCost:
    if layout.context == 1:
        return ContextCost()
    heads, kv_heads = local_heads(config, layout.tensor)
    ranks = head_ranks(config, layout)
    spans, shared = layout.context // ranks, math.lcm(kv_heads, ranks)
    of_slice = seq_len // layout.context * head_dim
    gathered = 2 * shared // ranks * seq_len * head_dim
    exchanged = 2 * (heads + shared) * of_slice if ranks > 1 else 0  # q, k, v and the output
    return ContextCost(
        kept=gathered + (heads - 2 * kv_heads) * of_slice,  # the output, which attention keeps, is also kept exchanged
        sent=(ranks - 1) / ranks * exchanged + (spans - 1) / spans * gathered,
        copied=_COPIES * (exchanged + (gathered if spans > 1 else 0)),
        work=2.0 if spans > 1 else 1.0,  # masked, not skipped
    )
