"""Says what a pipeline rank holds when its backward passes begin, by playing its passes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from recipes.common.config.placement import ONE_PASS, Placement
from recipes.common.pipeline.schedules import FORWARD, INPUTS, Pass, order_passes


@dataclass(frozen=True)
class Held:
    """Micro batches of each of a rank's chunks, in the model's order, as a backward pass begins."""

    chunk: int  # whose pass that is, by its place among the rank's own
    activations: tuple[float, ...]  # that wait for the gradient of their input
    factors: tuple[float, ...]  # whose weights' gradients are deferred

    @property
    def in_flight(self) -> float:
        """Return how many micro batches' activations, of all of the rank's layers."""
        return sum(self.activations) / len(self.activations)


@lru_cache
def held_in_backward(placement: Placement, micro_batches: int) -> tuple[tuple[Held, ...], ...]:
    """Return the different ones of each rank, in their order.

    Of a folded schedule, whose order the layers' costs shape, the most that it may hold: as much as 1F1B's first stage.
    """
    if placement.folded:
        most = (float(min(placement.pipeline, micro_batches)),) * 2
        return (tuple(Held(chunk, most, (0.0, 0.0)) for chunk in range(2)),) * placement.pipeline
    steady = (placement.per_rank + 2) * placement.pipeline  # micro batches, after which every lap is like the one before
    orders = order_passes(placement, min(micro_batches, steady), ())
    return tuple(_played(order, placement, rank) for rank, order in enumerate(orders))


def _played(order: Iterable[Pass], placement: Placement, rank: int) -> tuple[Held, ...]:
    own = placement.chunks_of(rank)
    activations, factors = dict.fromkeys(own, 0), dict.fromkeys(own, 0)
    found: dict[Held, None] = {}
    for kind, _, chunk in order:
        if kind == FORWARD:
            activations[chunk] += 1
        elif kind == INPUTS:
            found[Held(own.index(chunk), tuple(activations.values()), tuple(factors.values()))] = None
            activations[chunk] -= 1
            factors[chunk] += placement.schedule != ONE_PASS
        else:
            factors[chunk] -= 1
    return tuple(found)
