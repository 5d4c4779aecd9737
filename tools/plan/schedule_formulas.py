"""Computes what a pipeline schedule costs a step: its share of 1F1B's bubble, the messages that it waits for, and how early a
rank's chunks have their last gradients.

By formula, which is exact for equal chunks; a folded schedule has one for F = B = W alone, and its passes are played.
"""

from __future__ import annotations

from functools import lru_cache

from recipes.common.config.placement import FOLDED, ONE_PASS, Placement
from recipes.common.pipeline.schedules import Costs, finish_times, order_passes

_FULL = 3  # micro batches a stage, from which on a folded schedule's bubble stays as it is
_EVEN = 3.0  # F = B = W: the formula holds (arXiv 2401.10241, V-shaped)
_MOST_STAGES = 12  # that are played; a deeper pipeline loses the same share, to a few hundredths


def bubble_share(placement: Placement, micro_batches: int, passes: float) -> float:
    """Return the share of 1F1B's bubble that the schedule leaves.

    1F1B waits (p - 1)(F + B + W), ZB-H1 (p - 1)(F + B - W) (arXiv 2401.10241, table 1), where F, B and W take a forward pass
    each and recomputation adds to B: `passes` = F + B + W. With v chunks a stage, a v-th of that.
    """
    if placement.folded:
        pipeline = min(placement.pipeline, _MOST_STAGES)
        return _folded_share(pipeline, min(micro_batches, _FULL * pipeline), passes)
    left = 1.0 if placement.schedule == ONE_PASS else (passes - 2.0) / passes
    return left / placement.per_rank


@lru_cache
def _folded_share(pipeline: int, micro_batches: int, passes: float) -> float:
    if passes == _EVEN and micro_batches >= 2 * pipeline:
        return 1.0 / 6.0
    placement = Placement(FOLDED, pipeline, 2)
    costs = (Costs(0.5, (passes - 2.0) / 2, 0.5),) * placement.count
    lost = max(finish_times(order_passes(placement, micro_batches, costs), costs)) - micro_batches * passes
    return lost / ((pipeline - 1) * passes)


def exposed_messages(placement: Placement, micro_batches: int) -> float:
    """Return how many messages, one after another, a step waits for.

    1F1B has as many micro batches in flight as there are stages, so that each waits for its messages; so has a folded one, twice.
    The others have a pass in hand under which a message travels, and wait while the pipeline fills and drains.
    """
    stages, chunks = placement.pipeline, placement.per_rank
    if placement.folded or (chunks == 1 and placement.schedule == ONE_PASS):
        return 2.0 * chunks * (micro_batches + stages - 1)
    if placement.schedule == ONE_PASS:
        return 2.0 * chunks * stages - 2.0
    return (chunks + 3.0) * stages - 4.0


def gradient_laps(placement: Placement, micro_batches: int, passes: float) -> dict[str, float]:
    """Return the time model's fields of these names: which work comes after a chunk's last gradients of a step.

    Chunks go around in laps: all micro batches of the last lap pass through a rank's last chunk, then those of the chunk before.
    A zero bubble defers up to p - 1 weight gradients. The first chunk's last ones come layer by layer in two passes' worth of
    work (`pipeline.executor`): on the first rank with the input's gradient, on others with the deferred ones. Folded, both chunks
    have their last ones at the end, one pass each.
    """
    one_pass = placement.schedule == ONE_PASS
    laps = 1 if placement.folded else placement.per_rank
    return {
        "laps": float(laps),
        "lap_batches": float((micro_batches - 1) % placement.pipeline + 1),
        "last_passes": 1.0 if placement.folded else passes - 1.0,
        "deferred": 0.0 if one_pass else placement.pipeline - 1.0 + passes - 2.0,  # of the chunk's own only W goes beside
    }
