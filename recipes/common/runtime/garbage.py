"""Collects Python's garbage at the same steps on all ranks.

Left alone, each rank stops for it when its own counts say so, and every other waits for that rank in the next collective.
"""

from __future__ import annotations

import gc

EVERY_STEPS = 50  # what is freed by no count, objects that refer to each other, lives so long


def collect_by_steps() -> None:
    """Collect now, and from here on only in `collect_if_due`, which does not look at what exists by now: libraries, the model."""
    gc.collect()
    gc.freeze()
    gc.disable()


def collect_if_due(step: int) -> None:
    """Collect every EVERY_STEPS steps."""
    if step % EVERY_STEPS == 0:
        gc.collect()


def collect_as_usual() -> None:
    """Leave it to Python again: what follows is no step."""
    gc.unfreeze()
    gc.enable()
