"""Where a model is cut into stages: what its layers cost, and the cut that makes the dearest rank as cheap as can be."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate, pairwise

from recipes.common.config.placement import FOLDED
from recipes.common.pipeline.schedules import Costs

_AROUND = 3  # layers more or fewer than an even share, that a folded cut tries for each chunk


def cut_chunks(layers: list[float], head: float, pipeline: int, schedule: str, stated: tuple[int, ...] = ()) -> list[range]:
    """The layers of every chunk of a schedule (recipes.common.pipeline.schedules), in the model's order.

    stated: how many layers each has, where a layout says so.
    """
    if stated:
        return [range(start, stop) for start, stop in pairwise(accumulate(stated, initial=0))]
    return list(_cut(tuple(layers), head, pipeline, schedule))


@lru_cache  # the planner asks again and again, and a deep model takes a second
def _cut(layers: tuple[float, ...], head: float, pipeline: int, schedule: str) -> tuple[range, ...]:
    cut = fold_stages if schedule == FOLDED else balance_stages
    return tuple(cut(list(layers), head, pipeline))


def runs_by_rank(chunks: list[range], pipeline: int) -> list[tuple[range, ...]]:
    """The chunks of each stage's rank: one, or where there are twice as many as stages, one from either end of the model."""
    folded = len(chunks) == 2 * pipeline
    return [(chunks[rank], chunks[-1 - rank]) if folded else (chunks[rank],) for rank in range(pipeline)]


def balance_stages(layers: list[float], head: float, pipeline: int) -> list[range]:
    """Cut the layers into `pipeline` runs, each at least one layer, so that the dearest stage is as cheap as can be.

    The head and the loss burden the last stage; the embedding costs next to nothing. Dynamic programming over cuts; among
    equal cuts the one with earlier stages longer wins.
    """
    count = len(layers)
    assert pipeline <= count, (pipeline, count)
    prefix = _sums(layers)
    # best[n]: (dearest stage, cut points) of the first n layers in the stages so far
    best = {n: (prefix[n], [n]) for n in range(1, count + 1)}
    for stage in range(1, pipeline):
        burden = head if stage == pipeline - 1 else 0.0
        best = {
            n: min(
                ((max(best[m][0], prefix[n] - prefix[m] + burden), [*best[m][1], n]) for m in range(stage, n)),
                key=lambda option: (option[0], [-cut for cut in option[1]]),
            )
            for n in range(stage + 1, count + 1)
        }
    cuts = [0, *best[count][1]]
    return [range(start, stop) for start, stop in pairwise(cuts)]


def fold_stages(layers: list[float], head: float, pipeline: int) -> list[range]:
    """Cut the layers into 2 x `pipeline` runs, of which rank r has the r-th from the front and the r-th from the back.

    The dearest rank is as cheap as can be, the head burdening the first; among such cuts, a rank's two runs are as equal as can
    be. From the outside in: what is left after some ranks is a run of layers in the middle.
    """
    count, prefix = len(layers), _sums(layers)
    assert 2 * pipeline <= count, (pipeline, count)
    # best[front, back]: (dearest rank, squared differences of the two runs, cuts from the front, from the back)
    best = {(0, count): (0.0, 0.0, (0,), (count,))}
    for rank in range(pipeline):
        left = pipeline - 1 - rank  # ranks that are still to come
        found: dict[tuple[int, int], tuple[float, float, tuple, tuple]] = {}
        for (front, back), (dearest, unequal, starts, stops) in best.items():
            burden = head if rank == 0 else 0.0
            share = (prefix[back] - prefix[front] + burden) / (left + 1)
            of_up = max(share / 2 - burden, 0.0)  # layers' cost in the run from the back, which has the head
            of_down = max(share - burden - of_up, 0.0)
            for down in _near(prefix, front, of_down, back - front - 2 * left - 1, forward=True):
                ups = _near(prefix, back, of_up, back - front - down - 2 * left, forward=False) if left else ()
                for end in [back - up for up in ups] or [front + down]:
                    costs = prefix[front + down] - prefix[front], prefix[back] - prefix[end] + burden
                    option = (
                        max(dearest, sum(costs)), unequal + (costs[0] - costs[1]) ** 2, (*starts, front + down), (*stops, end)
                    )  # fmt: skip
                    place = (front + down, end)
                    if place not in found or option[:2] < found[place][:2]:
                        found[place] = option
        best = found
    _, _, starts, stops = min(best.values())
    cuts = [*starts, *stops[-2::-1]]
    return [range(start, stop) for start, stop in pairwise(cuts)]


def _near(prefix: list[float], place: int, share: float, most: int, *, forward: bool) -> range:
    """Numbers of layers, 1 to `most`, about as dear as `share`, from `place` on (or back)."""
    even = 0
    while even < most and abs(prefix[place + even if forward else place - even] - prefix[place]) < share:
        even += 1
    return range(max(1, even - _AROUND), min(most, even + _AROUND) + 1)


def _sums(layers: list[float]) -> list[float]:
    sums = [0.0]
    for cost in layers:
        sums.append(sums[-1] + cost)
    return sums


def pass_costs(
    layers: list[float], attention: list[float], head: float, chunks: list[range], recomputed: range
) -> tuple[Costs, ...]:
    """Of every chunk. The head's gradients are computed with the loss, in the last chunk's forward pass; attention's scores have
    no weights, and twice the work in the backward pass."""
    found = []
    for chunk in chunks:
        cost = sum(layers[index] for index in chunk)
        again = sum(layers[index] for index in chunk if index in recomputed)
        scores = sum(attention[index] for index in chunk)
        loss = 3.0 * head if chunk is chunks[-1] else 0.0
        found.append(Costs(cost + loss, cost + scores + again, cost - scores))
    return tuple(found)
