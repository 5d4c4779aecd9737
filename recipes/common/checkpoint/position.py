"""Holds where a run is: step, sequences consumed, sequences skipped, and the order in which they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from recipes.common.checkpoint.files import CheckpointError
from recipes.common.data.order import kept_index, merge_skips
from recipes.common.data.reading import UNCHANGED, Order, order_from_json


@dataclass(frozen=True, kw_only=True)
class RunPosition:
    """All that the loop itself remembers."""

    step: int = 0
    consumed_seqs: int = 0
    skipped_steps: int = 0
    skips: tuple[tuple[int, int], ...] = ()  # ranges of sequences (recipes.common.data.order.kept_index)
    order: Order = UNCHANGED  # consumed_seqs and skips count its sequences

    def consumed_tokens(self, seq_len: int) -> int:
        """Return the tokens read so far, skipped ones left out. seq_len: of the present order."""
        return self.consumed_seqs * seq_len + self.order.rest_tokens

    def next_index(self) -> int:
        """Return the index of the next sequence: those before it are read or skipped."""
        return int(kept_index(np.array([self.consumed_seqs]), self.skips)[0])

    def after_step(self, seqs: int, *, skipped: bool) -> RunPosition:
        return replace(
            self,
            step=self.step + 1,
            consumed_seqs=self.consumed_seqs + seqs,
            skipped_steps=self.skipped_steps + bool(skipped),
        )

    def skip(self, more: tuple[tuple[int, int], ...]) -> RunPosition:
        """Return it with more ranges of sequences to skip; those skipped already may be given again, as a restart does.

        Raises CheckpointError for a range that begins in what was read already.
        """
        here = self.next_index()
        for start, stop in more:
            known = any(first <= start and stop <= end for first, end in self.skips)
            if start < here and not known:
                raise CheckpointError(
                    f"--skip {start}:{stop}: step {self.step} has read up to sequence {here}; resume from a checkpoint before "
                    f"sequence {start}, or skip from {here} on"
                )
        return replace(self, skips=merge_skips((*self.skips, *more)))


def written_position(state: Mapping[str, Any]) -> RunPosition:
    """Return the position that a checkpoint's state.json holds."""
    return RunPosition(
        step=state["step"],
        consumed_seqs=state["consumed_seqs"],
        skipped_steps=state["skipped_steps"],
        skips=tuple((start, stop) for start, stop in state["skips"]),
        order=order_from_json(state["order"]) if "order" in state else UNCHANGED,
    )
