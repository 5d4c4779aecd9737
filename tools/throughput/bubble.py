"""Splits the pipeline's bubble into formula, imbalance, messages and warm-up; finds a better partition of the layers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recipes.common.config.placement import Placement
from recipes.common.model.decoder import find_stack
from recipes.common.model.flops import layer_costs
from recipes.common.model.initial_weights import build_empty
from recipes.common.pipeline.partition import chunks_by_rank, partition_layers
from recipes.common.pipeline.schedules import Costs, finish_times, order_passes
from recipes.common.recipe import Recipe
from recipes.common.runtime.step_clock import BACKWARD, CONTEXT, EXPERT, FORWARD, PARTS, RECOMPUTE, TENSOR, WEIGHTS
from tools.throughput.timings import MESSAGES, Timings


@dataclass(frozen=True)
class StageTimes:
    """Milliseconds of one micro batch on one rank's layers. `weights` is 0 where the backward pass includes it."""

    forward: float
    backward: float
    weights: float

    @property
    def all(self) -> float:
        return self.forward + self.backward + self.weights


@dataclass(frozen=True, kw_only=True)
class Bubble:
    """Shares of the time from the first to the last pass, the mean over ranks; the first four sum to `measured`."""

    formula: float  # equal stages, free messages
    imbalance: float  # added by unequal stages
    exposed_p2p: float  # messages that nothing overlapped
    warm_up: float  # the rest: filling and draining slower than the median pass, uneven passes
    measured: float


@dataclass(frozen=True, kw_only=True)
class Balance:
    """The balance of the stages, in ms of one micro batch."""

    stage_ms: list[float]
    imbalance: float  # slowest / mean - 1
    partition: list[list[tuple[int, int]]]  # each stage's runs of layers, as trained
    better_partition: list[list[tuple[int, int]]]
    better_stage_ms: list[float]
    better_field: str  # the field of a Layout that gives it
    saved_share: float  # of the step, by the better partition


def stage_times(timings: Timings) -> list[StageTimes]:
    """Return means over each stage's ranks. What tensor, context and expert ranks send counts half to each direction's passes."""
    found = []
    for stage in range(timings.pipeline):
        ranks = [rank for rank in timings.ranks if rank.stage == stage]
        part = {name: float(np.mean([np.median(rank.parts[:, PARTS.index(name)]) for rank in ranks])) for name in PARTS}
        found.append(
            StageTimes(
                (part[FORWARD] + (part[TENSOR] + part[CONTEXT] + part[EXPERT]) / 2) / timings.micro_batches,
                (part[BACKWARD] + part[RECOMPUTE] + (part[TENSOR] + part[CONTEXT] + part[EXPERT]) / 2) / timings.micro_batches,
                part[WEIGHTS] / timings.micro_batches,
            )
        )
    return found


def formula_share(placement: Placement, micro_batches: int, times: StageTimes) -> float:
    """Return the share of the passes' time in which a stage waits, for equal stages of v equal chunks.

    1F1B: (p - 1) / (v m + p - 1) (arXiv 2104.04473, sections 2.2.1 and 2.2.2). Zero bubble: b / (m(F + B + W) + b) with
    b = (p - 1)(F + B - W) / v (arXiv 2401.10241, table 1). Folded, or where p does not divide the micro batches of several
    chunks: from the schedule.
    """
    uneven = placement.per_rank > 1 and micro_batches % placement.pipeline
    if placement.folded or uneven:
        return simulate([times] * placement.pipeline, micro_batches, placement)
    lost = (placement.pipeline - 1) * (times.forward + times.backward - times.weights) / placement.per_rank
    return max(lost, 0.0) / (micro_batches * times.all + max(lost, 0.0))


def simulate(stages: list[StageTimes], micro_batches: int, placement: Placement) -> float:
    """Return the mean share in which stages wait, when passes take these times and messages none; a rank's chunks are equal."""
    count, share = len(stages), 1 / placement.per_rank
    owners = [stages[placement.rank_of(chunk)] for chunk in range(placement.count)]
    costs = tuple(Costs(share * s.forward, share * s.backward, share * s.weights) for s in owners)
    span = max(finish_times(order_passes(placement, micro_batches, costs), costs))
    return 1 - sum(stage.all for stage in stages) * micro_batches / count / span if span else 0.0


def find_bubble(timings: Timings) -> Bubble | None:
    """Return the bubble; None without a pipeline."""
    if timings.pipeline == 1:
        return None
    stages = stage_times(timings)
    mean = StageTimes(*(float(np.mean([getattr(s, name) for s in stages])) for name in ("forward", "backward", "weights")))
    passes = [PARTS.index(name) for name in (FORWARD, BACKWARD, RECOMPUTE, WEIGHTS, TENSOR, CONTEXT, EXPERT)]
    messages = [PARTS.index(name) for name in MESSAGES]
    measured, exposed = [], []
    for rank in timings.ranks:
        waited = float(np.median(rank.parts[:, messages].sum(axis=1)))
        span = float(np.median(rank.parts[:, passes + messages].sum(axis=1)))
        measured.append(waited / span if span else 0.0)
        exposed.append(min(rank.transfer_ms, waited) / span if span else 0.0)
    case = timings.micro_batches, timings.placement
    formula = formula_share(timings.placement, timings.micro_batches, mean)
    imbalance = simulate(stages, *case) - simulate([mean] * len(stages), *case)
    share, p2p = float(np.mean(measured)), float(np.mean(exposed))
    rest = share - formula - imbalance - p2p
    return Bubble(formula=formula, imbalance=imbalance, exposed_p2p=p2p, warm_up=rest, measured=share)


def find_balance(timings: Timings, recipe: Recipe) -> Balance | None:
    """Return the balance; None without a pipeline. A layer's time is proportional to its cost; the head takes the rest."""
    if timings.pipeline == 1:
        return None
    stages = [stage.all for stage in stage_times(timings)]
    partition = [next(rank.layers for rank in timings.ranks if rank.stage == stage) for stage in range(timings.pipeline)]
    causal = build_empty(recipe.model, recipe.attention)
    costs, _ = layer_costs(causal, find_stack(causal), recipe.batch.seq_len)
    with_head = timings.placement.rank_of(timings.placement.count - 1)

    def by_stage(layers: list[float], partition: list[list[tuple[int, int]]], head: float) -> list[float]:
        times = [sum(sum(layers[start:stop]) for start, stop in runs) for runs in partition]
        return [time + head * (stage == with_head) for stage, time in enumerate(times)]

    shares = by_stage(costs, partition, 0.0)
    rate = (sum(stages) - stages[with_head]) / (sum(shares) - shares[with_head])
    head = max(stages[with_head] - rate * shares[with_head], 0.0)
    if not head:
        rate = sum(stages) / sum(shares)
    layers = [rate * cost for cost in costs]
    chunks = partition_layers(layers, head, timings.placement)
    better = [[(chunk.start, chunk.stop) for chunk in own] for own in chunks_by_rank(chunks, timings.placement)]
    current, predicted = by_stage(layers, partition, head), by_stage(layers, better, head)
    saved = max(current) - max(predicted)
    return Balance(
        stage_ms=stages,
        imbalance=max(stages) / float(np.mean(stages)) - 1,
        partition=partition,
        better_partition=better,
        better_stage_ms=predicted,
        better_field=f"layers_per_stage={tuple(len(chunk) for chunk in chunks)}",
        saved_share=saved * timings.micro_batches / timings.step_ms(),
    )
