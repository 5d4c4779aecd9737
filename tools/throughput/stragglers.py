"""Which rank is slow by its own work, and what the run would gain without it.

A rank is held against its peers: the ranks of its stage, which compute the same. Only computing counts, so waiting for a slow
rank makes nobody slow. Each step gives each rank the logarithm of its time over its peers' median, so what slows a whole step
(a batch, a save) cancels. A rank's excess is the median of these over the steps. Its score counts the excess in standard errors:
of a median of noise that lingers from step to step, and of how far apart healthy machines are, which peers show where there are
enough of them, and HEALTHY says where there are not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tools.throughput.timings import Timings

LEAST_SLOWER = 0.01  # a smaller excess is called by nobody
SCORE = 4.5  # standard errors
HEALTHY, HEALTHY_WEIGHT = 0.003, 8  # deviation between healthy machines, and as how many peers that assumption counts
LEAST_STEPS = 8
WINDOW_STEPS = 50
MANY_RANKS = 16
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
    rest = ratios - center[..., None, :]
    within = _TO_DEVIATION * np.median(np.abs(rest), axis=-2)
    held = np.clip(rest, -3 * within[..., None, :], 3 * within[..., None, :])
    linger = (held[..., 1:, :] * held[..., :-1, :]).sum(-2) / np.maximum((held**2).sum(-2), 1e-30)
    linger = np.clip(linger, 0.0, 0.8)
    error = _MEDIAN_ERROR * within * np.sqrt((1 + linger) / (1 - linger) / steps)
    apart = HEALTHY**2 * np.ones_like(center)
    if ranks >= 4:  # as the others show it, the rank itself not counting
        seen = _over_peers(lambda others: np.median(np.abs(others - np.median(others, -1, keepdims=True)), -1), center)
        apart = (HEALTHY_WEIGHT * apart + (ranks - 1) * (_TO_DEVIATION * seen) ** 2) / (HEALTHY_WEIGHT + ranks - 1)
    # a rank lies apart from the middle of its peers as far as it does and as that middle does
    apart = apart * (1 + _MEDIAN_ERROR**2 / (ranks - 1))
    score = center / np.sqrt(error**2 + apart)
    called = (score >= SCORE) & (center >= np.log1p(LEAST_SLOWER)) & (steps >= LEAST_STEPS)
    return np.expm1(center), score, called


def _peers_median(values: np.ndarray) -> np.ndarray:
    """[..., ranks]: the median over the others."""
    return _over_peers(lambda others: np.median(others, axis=-1), values)


def _over_peers(figure: Callable[[np.ndarray], np.ndarray], values: np.ndarray) -> np.ndarray:
    """[..., ranks]: the figure of all the others. With many ranks one more or less is no matter."""
    ranks = values.shape[-1]
    if ranks > MANY_RANKS:
        return np.repeat(figure(values)[..., None], ranks, axis=-1)
    return np.stack([figure(np.delete(values, rank, axis=-1)) for rank in range(ranks)], axis=-1)


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
        usual = np.exp(_peers_median(np.log(np.maximum(compute, 1e-9))))
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
