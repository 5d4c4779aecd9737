"""Reads the next step's micro batches in a thread while the current step trains."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch


class Prefetcher:
    """Reads one step ahead. `next` returns bit for bit what `read` returns; it only waits less.

    read: (consumed, global_seqs) -> the micro batches of that step. following: (consumed, global_seqs) -> those of the step
    after it, as a guess: a wrong one (a skip, a resume) costs one wait and nothing else, since the caller holds the state.
    """

    def __init__(self, read: Callable[[int, int], list[torch.Tensor]], following: Callable[[int, int], tuple[int, int]]) -> None:
        self._read, self._following = read, following
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._pending: dict[tuple[int, int], Future] = {}
        self.wait_seconds = 0.0  # how long the last step waited for its batch

    def next(self, consumed: int, global_seqs: int) -> list[torch.Tensor]:
        """Return the micro batches of the step at `consumed`, and set `wait_seconds`. A read error is raised here."""
        start = time.perf_counter()
        wanted = (consumed, global_seqs)
        keys = (wanted, self._following(*wanted))
        for key in self._pending.keys() - set(keys):
            self._pending.pop(key).cancel()
        for key in keys:
            if key not in self._pending:
                self._pending[key] = self._pool.submit(self._read, *key)
        batches = self._pending.pop(wanted).result()
        self.wait_seconds = time.perf_counter() - start
        return batches

    def close(self) -> None:
        """Drop what was read ahead and end the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()
