"""Holds where a run is: step, sequences consumed, sequences skipped."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from recipes.common.checkpoint.files import CheckpointError
from recipes.common.data.order import kept_index, merge_skips


@dataclass(frozen=True, kw_only=True)
class RunPosition:
    """All that the loop itself remembers."""

    step: int = 0
    consumed_seqs: int = 0
    skipped_steps: int = 0
    skips: tuple[tuple[int, int], ...] = ()  # ranges of sequences (recipes.common.data.order.kept_index)

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
        here = int(kept_index(np.array([self.consumed_seqs]), self.skips)[0])
        for start, stop in more:
            known = any(first <= start and stop <= end for first, end in self.skips)
            if start < here and not known:
                raise CheckpointError(
                    f"--skip {start}:{stop}: step {self.step} has read up to sequence {here}; resume from a checkpoint before "
                    f"sequence {start}, or skip from {here} on"
                )
        return replace(self, skips=merge_skips((*self.skips, *more)))
