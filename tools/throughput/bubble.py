"""The pipeline's bubble: by formula, as measured, and what lies between; the balance of the stages, and a better cut."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recipes.common.recipe import Recipe
from recipes.common.plans import find_stack
from recipes.common.stage import balance_stages, layer_costs
from recipes.common.timers import BACKWARD, FORWARD, PARTS, RECOMPUTE, TENSOR, WEIGHTS
from recipes.common.weights import build_empty
from recipes.common.zero_bubble import ZeroBubbleSchedule
from tools.throughput.timings import MESSAGES, Timings

ZERO_BUBBLE = "zero_bubble"


@dataclass(frozen=True)
class StageTimes:
    """Milliseconds of one micro batch on one stage. `weights` is 0 where a backward pass computes them too."""

    forward: float
    backward: float
    weights: float

    @property
    def all(self) -> float:
        return self.forward + self.backward + self.weights


@dataclass(frozen=True, kw_only=True)
class Bubble:
    """Shares of the passes' time, first to last, the mean over ranks. `formula` + the three differences = `measured`."""

    formula: float  # equal stages, no time to send
    imbalance: float  # the stages' own times in the schedule, beyond equal ones
    exposed_p2p: float  # messages that nothing hid
    warm_up: float  # the rest: filling and draining slower than the median pass, unevenness of passes
    measured: float


@dataclass(frozen=True, kw_only=True)
class Balance:
    """Of the stages. ms for one micro batch."""

    stage_ms: list[float]
    imbalance: float  # dearest / mean - 1
    cut: list[tuple[int, int]]  # layers of each stage, as they are
    better_cut: list[tuple[int, int]]
    better_stage_ms: list[float]
    saved_share: float  # of the step, by the better cut


def stage_times(timings: Timings) -> list[StageTimes]:
    """Means over the ranks of a stage. Tensor-parallel communication is part of the passes, half in each direction."""
    found = []
    for stage in range(timings.pipeline):
        ranks = [rank for rank in timings.ranks if rank.stage == stage]
        part = {name: float(np.mean([np.median(rank.parts[:, PARTS.index(name)]) for rank in ranks])) for name in PARTS}
        found.append(
            StageTimes(
                (part[FORWARD] + part[TENSOR] / 2) / timings.micro_batches,
                (part[BACKWARD] + part[RECOMPUTE] + part[TENSOR] / 2) / timings.micro_batches,
                part[WEIGHTS] / timings.micro_batches,
            )
        )
    return found


def formula_share(pipeline: int, micro_batches: int, times: StageTimes) -> float:
    """Share of the passes' time in which a stage waits, stages being equal.

    1F1B: (p - 1) / (m + p - 1) (arXiv 2104.04473, section 2.2.1). Zero bubble: (p - 1)(F + B - W) over m(F + B + W) and itself
    (arXiv 2401.10241, table 1).
    """
    lost = (pipeline - 1) * (times.forward + times.backward - times.weights)
    return max(lost, 0.0) / (micro_batches * times.all + max(lost, 0.0))


def simulate(stages: list[StageTimes], micro_batches: int) -> float:
    """The share by which stages wait, the mean over them, when passes take these times and messages none."""
    count, split = len(stages), any(stage.weights for stage in stages)
    orders = []
    for stage in range(count):
        passes = ZeroBubbleSchedule(micro_batches, count, stage).passes()  # 1F1B is the same without the weights' passes
        orders.append([(kind, i) for kind, i in passes if split or kind != "W"])
    done: dict[tuple[str, int, int], float] = {}
    clock, at = [0.0] * count, [0] * count
    while any(at[stage] < len(orders[stage]) for stage in range(count)):
        for stage in range(count):
            while at[stage] < len(orders[stage]):
                kind, i = orders[stage][at[stage]]
                needs = None
                if kind == "F" and stage:
                    needs = ("F", stage - 1, i)
                elif kind == "B":
                    needs = ("B", stage + 1, i) if stage + 1 < count else ("F", stage, i)
                if needs is not None and needs not in done:
                    break
                lasts = {"F": stages[stage].forward, "B": stages[stage].backward, "W": stages[stage].weights}[kind]
                clock[stage] = max(clock[stage], done[needs] if needs else 0.0) + lasts
                done[kind, stage, i] = clock[stage]
                at[stage] += 1
    span = max(clock)
    return 1 - sum(stage.all for stage in stages) * micro_batches / count / span if span else 0.0


def find_bubble(timings: Timings) -> Bubble | None:
    """None without a pipeline."""
    if timings.pipeline == 1:
        return None
    stages = stage_times(timings)
    mean = StageTimes(*(float(np.mean([getattr(s, name) for s in stages])) for name in ("forward", "backward", "weights")))
    passes = [PARTS.index(name) for name in (FORWARD, BACKWARD, RECOMPUTE, WEIGHTS, TENSOR)]
    messages = [PARTS.index(name) for name in MESSAGES]
    measured, exposed = [], []
    for rank in timings.ranks:
        waited = float(np.median(rank.parts[:, messages].sum(axis=1)))
        span = float(np.median(rank.parts[:, passes + messages].sum(axis=1)))
        measured.append(waited / span if span else 0.0)
        exposed.append(min(rank.transfer_ms, waited) / span if span else 0.0)
    formula = formula_share(timings.pipeline, timings.micro_batches, mean)
    imbalance = simulate(stages, timings.micro_batches) - simulate([mean] * len(stages), timings.micro_batches)
    share, p2p = float(np.mean(measured)), float(np.mean(exposed))
    rest = share - formula - imbalance - p2p
    return Bubble(formula=formula, imbalance=imbalance, exposed_p2p=p2p, warm_up=rest, measured=share)


def find_balance(timings: Timings, recipe: Recipe) -> Balance | None:
    """None without a pipeline. A layer's time is its share, by cost, of its stage's; what the last stage has more is the head."""
    if timings.pipeline == 1:
        return None
    stages = [stage.all for stage in stage_times(timings)]
    cut = [next(rank.layers for rank in timings.ranks if rank.stage == stage) for stage in range(timings.pipeline)]
    causal = build_empty(recipe.model, recipe.attention)
    costs, _ = layer_costs(causal, find_stack(causal), recipe.batch.seq_len)
    by_stage = [sum(costs[start:stop]) for start, stop in cut]
    rate = sum(stages[:-1]) / sum(by_stage[:-1])
    head = max(stages[-1] - rate * by_stage[-1], 0.0)
    if not head:
        rate = sum(stages) / sum(by_stage)
    layers = [rate * cost for cost in costs]
    better = balance_stages(layers, head, timings.pipeline)
    predicted = [sum(layers[run.start : run.stop]) for run in better]
    predicted[-1] += head
    current = [rate * cost for cost in by_stage]
    current[-1] += head
    saved = max(current) - max(predicted)
    return Balance(
        stage_ms=stages,
        imbalance=max(stages) / float(np.mean(stages)) - 1,
        cut=cut,
        better_cut=[(run.start, run.stop) for run in better],
        better_stage_ms=predicted,
        saved_share=saved * timings.micro_batches / timings.step_ms(),
    )
