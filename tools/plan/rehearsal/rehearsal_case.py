"""Says what to rehearse; plain values, which are sent to the process that rehearses."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.common.recipe import Layout, Recipe

# what can follow the steps: a step that also measures the layers, an evaluation, the comparison of copies, a step that is
# skipped, the copies of a save, the copies of a resume
EXTRAS = ("layers", "evaluate", "drift", "skip", "save", "load")


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What to rehearse."""

    recipe: Recipe
    layout: Layout
    world_size: int
    rank: int
    micro_batches: tuple[int, ...]  # of each step, one after another
    extras: tuple[str, ...] = ()  # after those steps, some of EXTRAS
