"""Keeps this rank's part of rows that all tensor ranks have alike, until a deferred weight gradient needs them whole.

Under sequence parallelism a block's input, and the gradient of its output, are gathered: as many bytes on each of t ranks as
between blocks on all of them. Kept whole until a zero bubble computes the weight gradients, they were 32 of the 72 GiB of
Llama 405B's last stage (sixteen stages of four chunks, rehearsed). A part takes a t-th, and is gathered once more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

from recipes.common.parallel.collectives import UnderWay, start_all_gather_rows, start_all_gather_sequence

Gather = Callable[[torch.Tensor, dist.ProcessGroup], UnderWay]


class KeptInput:
    """A tensor of which this rank keeps its part. It is gathered when it is first asked for, or `start` has been called."""

    def __init__(self, part: torch.Tensor, group: dist.ProcessGroup, *, gather: Gather = start_all_gather_sequence) -> None:
        """gather: starts to concatenate the parts."""
        self.part, self._group, self._gather = part, group, gather
        self._under_way: UnderWay | None = None
        self._whole: torch.Tensor | None = None

    @property
    def is_whole(self) -> bool:
        return self._whole is not None

    def start(self) -> None:
        """Gather it beside what is computed next."""
        if self._whole is None and self._under_way is None:
            self._under_way = self._gather(self.part, self._group)

    def whole(self) -> torch.Tensor:
        if self._whole is None:
            self.start()
            self._whole, self._under_way = self._under_way.result(), None
        return self._whole

    def drop(self) -> None:
        """Keep the part alone again."""
        self._whole = None


class KeptRows(KeptInput):
    """Rows of which this rank keeps its part. Called as often as they are used, it gathers them for the first of these calls."""

    def __init__(
        self, part: torch.Tensor, group: dist.ProcessGroup, *, gather: Gather = start_all_gather_rows, uses: int = 1
    ) -> None:
        super().__init__(part, group, gather=gather)
        self._uses = uses

    def use_again(self) -> None:
        """Count one more call."""
        self._uses += 1

    def __call__(self) -> torch.Tensor:
        whole = self.whole()
        self._uses -= 1
        if not self._uses:
            self.drop()
        return whole.reshape(-1, whole.shape[-1])


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
        own = rows.chunk(dist.get_world_size(self._group))[dist.get_rank(self._group)].clone()
        kept = KeptRows(own, self._group)
        self._last = storage, view, kept
        return kept
