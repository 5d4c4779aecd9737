"""Opens a recipe's data and reads the micro batches of each step, in an order that no layout or batch size changes.

The whole state of reading is one integer, the sequences consumed. The shards themselves are `recipes.common.data.shards`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from recipes.common.data.blend import BlendedStream, blend_problems, folders, open_blend
from recipes.common.data.order import kept_index
from recipes.common.data.reading import NOTHING_READ, UNCHANGED, Order
from recipes.common.data.shards import TokenStream, data_problems, open_split
from recipes.common.recipe import Blend, from_root


def open_train(data: str | Blend, seq_len: int, order: Order = UNCHANGED) -> TokenStream | BlendedStream:
    """Open the train split of a recipe's `data`, to be read in `order`."""
    if isinstance(data, Blend):
        return open_blend(data, seq_len, order)
    reading = order.readings.get(data, NOTHING_READ)
    return open_split(from_root(data), "train", seq_len, reading=reading, start_seqs=order.start_seqs)


def open_validation(data: str | Blend, seq_len: int) -> dict[str, TokenStream]:
    """Open the validation split of each folder of a recipe's `data`: their losses say more apart than blended."""
    names = folders(data) if isinstance(data, Blend) else [data]
    return {name: open_split(from_root(name), "validation", seq_len) for name in names}


def recipe_data_problems(data: str | Blend, *, seq_len: int, **checks: Any) -> list[str]:
    """Return `data_problems` of every folder of a recipe's `data`, and problems of the weights."""
    problems = blend_problems(data, seq_len) if isinstance(data, Blend) else []
    for name in folders(data) if isinstance(data, Blend) else [data]:
        problems += data_problems(from_root(name), seq_len=seq_len, **checks)
    return problems


def context_slice(tokens: torch.Tensor, context_rank: int, context: int) -> torch.Tensor:
    """Return one context rank's slice of sequences [.., S + 1]: [.., S / context + 1], whose last token is only a target."""
    length = (tokens.shape[-1] - 1) // context
    return tokens[..., context_rank * length : (context_rank + 1) * length + 1]


def _rank_rows(total: int, micro_seqs: int, data_rank: int, data_size: int) -> np.ndarray:
    """Return which of `total` sequences one data rank reads: int64 [micro batches, micro_seqs]."""
    return np.arange(total, dtype=np.int64).reshape(-1, data_size, micro_seqs)[:, data_rank]


def step_micro_batches(
    stream: TokenStream | BlendedStream,
    *,
    seed: int,
    consumed: int,
    global_seqs: int,
    micro_seqs: int,
    data_rank: int,
    data_size: int,
    skips: Sequence[tuple[int, int]] = (),
) -> list[torch.Tensor]:
    """Read the micro batches of one data rank for the step that starts at sequence `consumed`: int64 [micro_seqs, S + 1].

    Sequence i of the step is in micro batch i // (micro_seqs * data_size) of data rank (i // micro_seqs) % data_size,
    so the step holds the same sequences in every layout. `skips` are ranges of sequences to skip (`kept_index`).
    """
    if global_seqs % (micro_seqs * data_size):
        raise ValueError(f"global_seqs={global_seqs} is not a multiple of micro_seqs={micro_seqs} x data parallel {data_size}")
    rows = _rank_rows(global_seqs, micro_seqs, data_rank, data_size)
    index = kept_index(consumed + rows.ravel(), skips)
    tokens = torch.from_numpy(stream.read_sequences(seed, index))
    return list(tokens.view(*rows.shape, -1).unbind(0))


def validation_micro_batches(
    stream: TokenStream, *, seqs: int, micro_seqs: int, data_rank: int, data_size: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Read the first `seqs` sequences of a split, in order: (tokens int64 [micro_seqs, S + 1], valid bool [micro_seqs]).

    Every rank gets the same number of micro batches; what fills the last ones is marked invalid, so that over all ranks
    each sequence counts exactly once.
    """
    if not 1 <= seqs <= stream.num_positions:
        raise ValueError(f"evaluation.seqs={seqs} is not in [1, {stream.num_positions}], what the {stream.split} split holds")
    step = micro_seqs * data_size
    rows = _rank_rows(-(-seqs // step) * step, micro_seqs, data_rank, data_size)
    valid = torch.from_numpy(rows < seqs)
    tokens = torch.from_numpy(stream.read(np.where(rows < seqs, rows, 0).ravel()))
    return list(zip(tokens.view(*rows.shape, -1).unbind(0), valid.unbind(0), strict=True))
