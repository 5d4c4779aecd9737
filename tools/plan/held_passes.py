"""Says what a pipeline rank holds when its backward passes begin, by playing its passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from operator import ge

from recipes.common.config.placement import ONE_PASS, Placement
from recipes.common.pipeline.schedules import FORWARD, MOST_DEFERRED, WEIGHTS, Pass, order_passes


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


def held_in_backward(placement: Placement, micro_batches: int) -> tuple[tuple[Held, ...], ...]:
    """Return, of each rank, what it holds at most: nothing that holds no more than another does at a pass of the same chunk.

    Of a folded schedule, whose order the layers' costs shape, the most that it may hold: as many layers' activations as 1F1B's
    first stage, some of which may have become factors. (Those of layers that are not recomputed are no more than these.)
    """
    steady = 3 * placement.pipeline  # micro batches: those that fill it, those of one round of laps, and as many again
    return _played(placement, min(micro_batches, steady))


@cache
def _played(placement: Placement, micro_batches: int) -> tuple[tuple[Held, ...], ...]:
    if placement.folded:
        most = float(min(placement.pipeline, micro_batches))
        deferred = {(min(down, most), min(MOST_DEFERRED - down, most)) for down in range(MOST_DEFERRED + 1)} | {(0.0, 0.0)}
        each = tuple(Held(chunk, (most - down, most - up), (down, up)) for down, up in sorted(deferred) for chunk in range(2))
        return (each,) * placement.pipeline
    if placement.per_rank == 1:
        return tuple((_of_one_chunk(placement, rank, micro_batches),) for rank in range(placement.pipeline))
    orders = order_passes(placement, micro_batches, ())
    return tuple(_most(_backward_passes(order, placement.chunks_of(rank))) for rank, order in enumerate(orders))


def _of_one_chunk(placement: Placement, rank: int, micro_batches: int) -> Held:
    """Compute what a rank holds at most. A zero bubble defers weight gradients while forward passes are left."""
    ahead = placement.pipeline - rank
    deferred = min(rank, max(micro_batches - ahead, 0)) if placement.schedule != ONE_PASS else 0
    return Held(0, (min(ahead, micro_batches),), (deferred,))


def _most(found: dict[int, set[tuple[int, ...]]]) -> tuple[Held, ...]:
    """Keep those that hold more than any other. found: place of the pass's chunk -> activations and factors, by chunk."""
    kept = []
    for chunk, counts in found.items():
        most: list[tuple[int, ...]] = []
        for each in sorted(counts, reverse=True):
            if not any(all(map(ge, more, each)) for more in most):
                most.append(each)
        kept += [Held(chunk, each[: len(each) // 2], each[len(each) // 2 :]) for each in most]
    return tuple(kept)


def _backward_passes(order: Sequence[Pass], own: Sequence[int]) -> dict[int, set[tuple[int, ...]]]:
    """Play a rank's passes; see `_most`. What a backward pass leaves are factors, until a pass of the weights' gradients."""
    place = {chunk: index for index, chunk in enumerate(own)}
    held, deferring = [0] * (2 * len(own)), any(step.kind == WEIGHTS for step in order)
    found: dict[int, set[tuple[int, ...]]] = {index: set() for index in range(len(own))}
    for kind, _, chunk in order:
        index = place[chunk]
        if kind == FORWARD:
            held[index] += 1
        elif kind == WEIGHTS:
            held[len(own) + index] -= 1
        else:
            found[index].add(tuple(held))
            held[index] -= 1
            held[len(own) + index] += deferring
    return found
