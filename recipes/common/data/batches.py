"""What each step reads: the micro batches of a data rank, in an order that no layout, batch size or worker count changes.

The whole state of reading is one integer, the sequences consumed. The shards themselves are `recipes.common.data.shards`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipes.common.data.blend import Blend, BlendedStream, blend_problems, folders, open_blend
from recipes.common.data.order import kept_index
from recipes.common.data.shards import TokenStream, data_problems, open_split

__all__ = [
    "Blend",
    "BlendedStream",
    "Prefetcher",
    "TokenStream",
    "data_problems",
    "document_positions",
    "masking_problem",
    "open_blend",
    "open_split",
    "open_train",
    "open_validation",
    "recipe_data_problems",
    "step_micro_batches",
    "validation_micro_batches",
]

# attn_implementations of transformers 5.23 that read document bounds off restarting positions: from a batch, or from
# a batch of one sequence only (modeling_flash_attention_utils._is_packed_sequence)
MASKS = ("sdpa", "eager", "flex_attention")
MASKS_ALONE = ("flash_attention_2", "flash_attention_3")


def open_train(data: str | Blend, resolve: Callable[[str], Path], seq_len: int) -> TokenStream | BlendedStream:
    """The train split of a recipe's `data`; `resolve` turns a folder as written into a path."""
    if isinstance(data, Blend):
        return open_blend(data, {name: resolve(name) for name in folders(data)}, seq_len)
    return open_split(resolve(data), "train", seq_len)


def open_validation(data: str | Blend, resolve: Callable[[str], Path], seq_len: int) -> dict[str, TokenStream]:
    """The validation split of each folder of a recipe's `data`: their losses mean more apart than blended."""
    names = folders(data) if isinstance(data, Blend) else [data]
    return {name: open_split(resolve(name), "validation", seq_len) for name in names}


def recipe_data_problems(data: str | Blend, resolve: Callable[[str], Path], *, seq_len: int, **checks: Any) -> list[str]:
    """`data_problems` of every folder of a recipe's `data`, and of the weights."""
    problems = blend_problems(data, seq_len) if isinstance(data, Blend) else []
    for name in folders(data) if isinstance(data, Blend) else [data]:
        problems += data_problems(resolve(name), seq_len=seq_len, **checks)
    return problems


def _rank_rows(total: int, micro_seqs: int, data_rank: int, data_size: int) -> np.ndarray:
    """Which of `total` sequences one data rank sees: int64 [micro batches, micro_seqs]."""
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
    """The micro batches of one data rank for the step that starts at sequence `consumed`: int64 [micro_seqs, S + 1].

    Sequence i of the step is in micro batch i // (micro_seqs * data_size) of data rank (i // micro_seqs) % data_size,
    so the step holds the same sequences in every layout. `skips` are ranges of sequences to leave out (`kept_index`).
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
    """The first `seqs` sequences of a split, in order: (tokens int64 [micro_seqs, S + 1], valid bool [micro_seqs]).

    Every rank gets the same number of micro batches; what fills the last ones is marked invalid, so over all ranks
    each sequence counts exactly once.
    """
    if not 1 <= seqs <= stream.num_positions:
        raise ValueError(f"evaluation.seqs={seqs} is not in [1, {stream.num_positions}], what the {stream.split} split holds")
    step = micro_seqs * data_size
    rows = _rank_rows(-(-seqs // step) * step, micro_seqs, data_rank, data_size)
    valid = torch.from_numpy(rows < seqs)
    tokens = torch.from_numpy(stream.read(np.where(rows < seqs, rows, 0).ravel()))
    return list(zip(tokens.view(*rows.shape, -1).unbind(0), valid.unbind(0), strict=True))


def document_positions(tokens: torch.Tensor, eos_id: int) -> torch.Tensor:
    """Positions that restart after each end token: int64 [B, S] -> int64 [B, S].

    Given to a transformers model as `position_ids`, without an attention mask and with use_cache=False, they also keep
    attention inside each document (transformers.masking_utils), unless `masking_problem` says otherwise.
    """
    starts = torch.zeros_like(tokens)
    starts[:, 1:] = tokens[:, :-1] == eos_id
    here = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return here - torch.where(starts.bool(), here, 0).cummax(dim=1).values


def masking_problem(attention: str, micro_seqs: int) -> str | None:
    """Why documents cannot be masked from each other with this `attn_implementation`; None if they can."""
    if attention in MASKS_ALONE:
        if micro_seqs == 1:
            return None
        return (
            f"batch.micro_seqs={micro_seqs}: attention={attention} keeps documents apart only with one sequence in a "
            "micro batch (with more, transformers ignores the restarts in silence); set batch.micro_seqs=1"
        )
    if attention in MASKS:
        return None
    names = ", ".join(MASKS + MASKS_ALONE)
    return f"attention={attention} cannot keep documents apart; choose one of {names}, or turn document masking off"


class Prefetcher:
    """Reads steps ahead in threads. `next` returns bitwise what the plain call returns; it only waits less.

    The steps after (consumed, global_seqs) are guessed by `following`, by default the same batch again. A wrong guess
    (a batch ramp, a skip, a resume) costs one wait and nothing else: the only state is the caller's `consumed`.
    """

    def __init__(
        self,
        read: Callable[[int, int], list[torch.Tensor]],
        *,
        workers: int = 1,
        following: Callable[[int, int], tuple[int, int]] | None = None,
    ) -> None:
        self._read = read
        self._following = following or (lambda consumed, global_seqs: (consumed + global_seqs, global_seqs))
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch") if workers else None
        self._ahead = workers
        self._pending: dict[tuple[int, int], Future] = {}
        self.wait_seconds = 0.0  # how long the last step waited for its batch

    def next(self, consumed: int, global_seqs: int) -> list[torch.Tensor]:
        """The micro batches of the step at `consumed`; sets `wait_seconds`. A read error is raised here."""
        start = time.perf_counter()
        if self._pool is None:
            batches = self._read(consumed, global_seqs)
        else:
            wanted = [(consumed, global_seqs)]
            while len(wanted) <= self._ahead:
                wanted.append(self._following(*wanted[-1]))
            for key in self._pending.keys() - set(wanted):
                self._pending.pop(key).cancel()
            for key in wanted:
                if key not in self._pending:
                    self._pending[key] = self._pool.submit(self._read, *key)
            batches = self._pending.pop(wanted[0]).result()
        self.wait_seconds = time.perf_counter() - start
        return batches

    def close(self) -> None:
        """Drop what was read ahead and let the threads end."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pending.clear()
