"""Partitions a model's layers into chunks: the partition that minimises the most expensive rank."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate, pairwise, permutations
from math import inf

from recipes.common.config.placement import Placement
from recipes.common.pipeline.schedules import Costs

# What norms, activations and residuals take beside a layer's products, of its products' forward pass: in that, and in the
# gradient of its input. Weights' gradients have none of it. Counted in the steps that `tools.plan` rehearses, on an H100: Llama
# 8B, compiled, 0.10 and 0.14; 70B 0.05 and 0.08, and its messages between tensor ranks; 1B 0.19 and 0.28; not compiled, more
_BESIDE_FORWARD, _BESIDE_INPUTS = 0.1, 0.15
_AROUND = 3  # layers more or fewer than an even part, tried for each chunk of a folded partition


def partition_layers(
    layers: list[float], head: float, placement: Placement, layers_per_stage: tuple[int, ...] = ()
) -> list[range]:
    """Return the layers of every chunk, in the model's order.

    layers, head: costs of each layer, and of the head with the loss. layers_per_stage: lengths of the chunks, where a layout
    gives them.
    """
    if layers_per_stage:
        return [range(start, stop) for start, stop in pairwise(accumulate(layers_per_stage, initial=0))]
    return list(_partition(tuple(layers), head, placement))


@lru_cache  # the planner asks again and again, and a deep model takes a second
def _partition(layers: tuple[float, ...], head: float, placement: Placement) -> tuple[range, ...]:
    if placement.folded:
        return tuple(balance_folded(list(layers), head, placement.pipeline))
    if placement.per_rank > 1:
        return tuple(balance_rounds(list(layers), head, placement))
    return tuple(balance_stages(list(layers), head, placement.pipeline))


def chunks_by_rank(chunks: list[range], placement: Placement) -> list[tuple[range, ...]]:
    """Return each pipeline rank's chunks, in the model's order."""
    return [tuple(chunks[chunk] for chunk in placement.chunks_of(rank)) for rank in range(placement.pipeline)]


def balance_stages(layers: list[float], head: float, pipeline: int) -> list[range]:
    """Partition the layers into `pipeline` chunks of at least one layer, so that the most expensive costs as little as it can.

    The head and the loss are the last chunk's; the embedding costs next to nothing. Dynamic programming over boundaries; among
    equal partitions the one with earlier chunks longer wins.
    """
    count = len(layers)
    assert pipeline <= count, (pipeline, count)
    prefix = list(accumulate(layers, initial=0.0))
    # of layers [0, stop) in the chunks so far: the most expensive chunk, and the boundaries
    dearest = {stop: prefix[stop] for stop in range(1, count + 1)}
    bounds = {stop: (stop,) for stop in range(1, count + 1)}
    for stage in range(1, pipeline):
        own = head if stage == pipeline - 1 else 0.0
        costs, parts = {}, {}
        for stop in range(stage + 1, count + 1):
            options = [max(dearest[start], prefix[stop] - prefix[start] + own) for start in range(stage, stop)]
            costs[stop] = least = min(options)
            parts[stop] = (*max(bounds[stage + i] for i, option in enumerate(options) if option == least), stop)
        dearest, bounds = costs, parts
    return [range(start, stop) for start, stop in pairwise([0, *bounds[count]])]


def balance_rounds(layers: list[float], head: float, placement: Placement) -> list[range]:
    """Partition the layers into chunks that go around the ranks.

    The most expensive rank costs as little as was found; among such partitions, the chunks are as equal as was found. Every rank
    gets its number of layers as if all cost the same, in chunks as even as that allows; then layers are moved between chunks as
    long as that improves. (What costs all the same is at its best from the start.)
    """
    count, prefix = len(layers), list(accumulate(layers, initial=0.0))
    assert placement.count <= count, (placement, count)
    mean = prefix[-1] / count
    totals = [placement.per_rank + (head / mean if rank == placement.pipeline - 1 else 0.0) for rank in range(placement.pipeline)]
    lengths = [1] * placement.count
    for _ in range(count - placement.count):
        rank = min(range(placement.pipeline), key=lambda rank: totals[rank])
        totals[rank] += 1
        # its shortest chunk, the earliest; the head is as much as layers in the last one
        last = placement.count - 1
        chunk = min(placement.chunks_of(rank), key=lambda chunk: lengths[chunk] + (head / mean if chunk == last else 0.0))
        lengths[chunk] += 1

    def measure(lengths: list[int]) -> tuple[float, float]:
        bounds = [prefix[stop] for stop in accumulate(lengths, initial=0)]
        costs = [stop - start for start, stop in pairwise(bounds)]
        costs[-1] += head
        ranks = [sum(costs[rank :: placement.pipeline]) for rank in range(placement.pipeline)]
        return round(max(ranks) / mean, 9), round(sum(cost**2 for cost in costs) / mean**2, 6)

    best, improved = measure(lengths), len(set(layers)) > 1
    while improved:
        moves = [
            [length - (i == source) + (i == target) for i, length in enumerate(lengths)]
            for source, target in permutations(range(len(lengths)), 2)
            if lengths[source] > 1
        ]
        found, candidate = min((measure(move), move) for move in moves) if moves else (best, lengths)
        improved = found < best
        if improved:
            best, lengths = found, candidate
    return [range(start, stop) for start, stop in pairwise(accumulate(lengths, initial=0))]


def balance_folded(layers: list[float], head: float, pipeline: int) -> list[range]:
    """Partition the layers into 2 x `pipeline` chunks, of which rank r has the r-th from the front and the r-th from the back.

        layers   0  1  2  3  4  5  6  7  head        two ranks, a head as expensive as two layers
        rank 0  [0  1]                [7  head]
        rank 1        [2  3][4  5  6]

    The most expensive rank costs as little as it can; among such partitions, a rank's two chunks are as equal as they can be.
    From the outside in: what some ranks leave over is a range of layers in the middle.
    """
    prefix = list(accumulate(layers, initial=0.0))
    assert 2 * pipeline <= len(layers), (pipeline, len(layers))
    near = _fold(prefix, head, pipeline, _AROUND // 2, inf)  # what is dearer than this is not looked at again
    starts, stops = _fold(prefix, head, pipeline, _AROUND, near[0] if near else inf)[2:]
    return [range(start, stop) for start, stop in pairwise([*starts, *stops[-2::-1]])]


def _fold(
    prefix: list[float], head: float, pipeline: int, around: int, most: float
) -> tuple[float, float, tuple[int, ...], tuple[int, ...]] | None:
    """Return (most expensive rank, squared differences of two chunks, boundaries from the front, from the back), or None.

    around: layers more or fewer than an even part, tried for each chunk. most: what no rank costs more than.
    """
    count = len(prefix) - 1
    # the same of the ranks so far, where they leave over layers [front, back)
    best = {(0, count): (0.0, 0.0, (0,), (count,))}
    for rank in range(pipeline):
        ranks_left = pipeline - 1 - rank
        own = head if rank == 0 else 0.0
        found: dict[tuple[int, int], tuple[float, float, tuple, tuple]] = {}
        for (front, back), (dearest, unequal, starts, stops) in best.items():
            budget = (prefix[back] - prefix[front] + own) / (ranks_left + 1)
            up_budget = max(budget / 2 - own, 0.0)  # for layers in the chunk from the back, which has the head
            down_budget = max(budget - own - up_budget, 0.0)
            for down in _lengths(prefix, front, down_budget, back - front - 2 * ranks_left - 1, around, forward=True):
                down_stop = front + down
                most_up = back - down_stop - 2 * ranks_left
                ups = _lengths(prefix, back, up_budget, most_up, around, forward=False) if ranks_left else ()
                for up_start in [back - up for up in ups] or [down_stop]:
                    down_cost, up_cost = prefix[down_stop] - prefix[front], prefix[back] - prefix[up_start] + own
                    cost = down_cost + up_cost
                    if cost > most:
                        continue
                    measure = (dearest if cost < dearest else cost, unequal + (down_cost - up_cost) ** 2)
                    left_over = (down_stop, up_start)
                    if left_over not in found or measure < found[left_over][:2]:
                        found[left_over] = (*measure, (*starts, down_stop), (*stops, up_start))
        best = found
    return min(best.values(), default=None)


def _lengths(prefix: list[float], start: int, budget: float, most: int, around: int, *, forward: bool) -> range:
    """Return numbers of layers, 1 to `most`, that cost about `budget` from `start` on (or back)."""
    even = 0
    while even < most and abs(prefix[start + even if forward else start - even] - prefix[start]) < budget:
        even += 1
    return range(max(1, even - around), min(most, even + around) + 1)


def pass_costs(
    layers: list[float], attention: list[float], head: float, chunks: list[range], recomputed: range, late_head: float
) -> tuple[Costs, ...]:
    """Return the costs of every chunk's passes.

    The head's gradients are computed with the loss, in the last chunk's forward pass, but of its weight's the share `late_head`;
    attention's scores have no weights, and twice the work in the backward pass.
    """
    found = []
    for chunk in chunks:
        cost = sum(layers[index] for index in chunk)
        again = sum(layers[index] for index in chunk if index in recomputed)
        scores = sum(attention[index] for index in chunk)
        loss, late = ((3.0 - late_head) * head, late_head * head) if chunk is chunks[-1] else (0.0, 0.0)
        forward, again = cost + cost * _BESIDE_FORWARD, again + again * _BESIDE_FORWARD
        inputs = cost + scores + cost * _BESIDE_INPUTS + again
        found.append(Costs(forward + loss, inputs, cost - scores, late, len(chunk), again > 0.0))
    return tuple(found)
