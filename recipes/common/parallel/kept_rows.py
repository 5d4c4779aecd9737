"""Keeps this rank's part of rows that all tensor ranks have alike, until a deferred weight gradient needs them whole.

Under sequence parallelism a block's input, and the gradient of its output, are gathered: as many bytes on each of t ranks as
between blocks on all of them. Kept whole until a zero bubble computes the weight gradients, they were 32 of the 72 GiB of
Llama 405B's last stage (sixteen stages of four chunks, rehearsed). A part takes a t-th, and is gathered once more.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

from recipes.common.parallel.collectives import all_gather_rows


class KeptRows:
    """Rows of which this rank keeps its part. Called as often as they are kept, it gathers them for the first of these calls."""

    def __init__(self, rows: torch.Tensor, group: dist.ProcessGroup) -> None:
        self._part = rows.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone()
        self._group, self._uses = group, 1
        self._whole: torch.Tensor | None = None

    @property
    def is_whole(self) -> bool:
        return self._whole is not None

    def use_again(self) -> None:
        """Count one more call."""
        self._uses += 1

    def __call__(self) -> torch.Tensor:
        whole = self._whole if self._whole is not None else all_gather_rows(self._part, self._group)
        self._uses -= 1
        self._whole = whole if self._uses else None
        return whole


class RowKeeper:
    """Keeps parts of rows one after another. Linears that share their rows (queries, keys, values) share one KeptRows."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._last: tuple[StorageWeakRef, tuple, KeptRows] | None = None  # the storage and the view of the last rows

    def __call__(self, rows: torch.Tensor) -> torch.Tensor | KeptRows:
        """Return what gives `rows` [n, width] back: themselves, where the ranks do not divide n."""
        if len(rows) % dist.get_world_size(self._group):
            return rows
        storage, view = StorageWeakRef(rows.untyped_storage()), (rows.shape, rows.stride(), rows.storage_offset())
        if self._last is not None:
            last_storage, last_view, kept = self._last
            # a storage that lives is the same one; its address alone may be another's by now
            if not last_storage.expired() and last_storage == storage and last_view == view and not kept.is_whole:
                kept.use_again()
                return kept
        kept = KeptRows(rows, self._group)
        self._last = storage, view, kept
        return kept
