"""Which rank is slow by its own work, and what the run would gain without it.

A rank is held against its peers: the ranks of its stage, which compute the same. Only computing counts, so waiting for a slow rank
makes nobody slow. Each step gives each rank the logarithm of its time over its peers' median, so what slows a whole step
(a batch, a save) cancels; the rank's score is the median of these over the steps, in units of its standard error. The error
is that of a median under noise estimated by median absolute deviations, within the rank and between its peers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tools.throughput.timings import Timings

LEAST_SLOWER = 0.01  # a smaller excess is called by nobody
SCORE = 5.0  # standard errors
LEAST_STEPS = 8
WINDOW_STEPS = 50
_TO_DEVIATION = 1.4826  # from a median absolute deviation to a standard one, for normal noise
_MEDIAN_ERROR = 1.2533  # the standard error of a median over that of a mean


@dataclass(frozen=True, kw_only=True)
class Straggler:
    rank: int
    stage: int
    host: str
    compute_ms: float  # a step
    slower: float  # than its peers, as a share
    score: float
    called: bool
    gain_ms: float  # of a step, were it as its peers


def judge(compute: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(slower, score, called), each [..., ranks], of compute [..., steps, ranks]: times of ranks that do the same work."""
    ratios = np.log(np.maximum(compute, 1e-9))
    ratios = ratios - _peers_median(ratios)
    steps, ranks = ratios.shape[-2:]
    center = np.median(ratios, axis=-2)
    within = _TO_DEVIATION * np.median(np.abs(ratios - center[..., None, :]), axis=-2)
    error = _MEDIAN_ERROR * within / np.sqrt(steps)
    if ranks >= 4:  # how far apart healthy ranks are, the odd one not counting
        spread = _TO_DEVIATION * np.median(np.abs(center - np.median(center, axis=-1, keepdims=True)), axis=-1, keepdims=True)
        error = np.hypot(error, spread)
    score = center / np.maximum(error, 1e-6)
    called = (score >= SCORE) & (center >= np.log1p(LEAST_SLOWER)) & (steps >= LEAST_STEPS)
    return np.expm1(center), score, called


def _peers_median(values: np.ndarray) -> np.ndarray:
    """[..., steps, ranks]: the median over the others. With many ranks one more or less is no matter."""
    ranks = values.shape[-1]
    if ranks > 16:
        return np.median(values, axis=-1, keepdims=True)
    others = [np.median(np.delete(values, rank, axis=-1), axis=-1) for rank in range(ranks)]
    return np.stack(others, axis=-1)


def rank_stragglers(timings: Timings) -> list[Straggler]:
    """All ranks that have peers, the slowest by score first, over the last WINDOW_STEPS steps that every rank has."""
    common = set.intersection(*(set(rank.last_steps.tolist()) for rank in timings.ranks))
    kept = sorted(common)[-WINDOW_STEPS:]
    if not kept:
        return []
    times = {}
    for rank in timings.ranks:
        newest = dict(zip(rank.last_steps.tolist(), rank.compute().tolist(), strict=True))
        times[rank.rank] = np.array([newest[step] for step in kept])
    slowest = np.max(list(times.values()), axis=0)
    found = []
    for stage in range(timings.pipeline):
        peers = [rank for rank in timings.ranks if rank.stage == stage]
        if len(peers) < 2:
            continue
        compute = np.stack([times[rank.rank] for rank in peers], axis=-1)
        slower, score, called = judge(compute)
        usual = np.exp(_peers_median(np.log(np.maximum(compute, 1e-9)))) + np.zeros_like(compute)
        for index, rank in enumerate(peers):
            rest = np.max([times[other] for other in times if other != rank.rank], axis=0)
            without = np.maximum(rest, np.minimum(usual[:, index], times[rank.rank]))
            found.append(
                Straggler(
                    rank=rank.rank,
                    stage=stage,
                    host=rank.host,
                    compute_ms=float(np.median(compute[:, index])),
                    slower=float(slower[index]),
                    score=float(score[index]),
                    called=bool(called[index]),
                    gain_ms=float(np.median(slowest - without)),
                )
            )
    return sorted(found, key=lambda straggler: -straggler.score)
