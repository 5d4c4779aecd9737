"""Finds ranks that are slow by their own work, and what the run would gain without them.

1. A rank is compared with its peers, the ranks of its stage, which compute the same. Only computing counts, so waiting for a slow
   rank makes no rank slow. Each step gives a rank the logarithm of its time over its peers' median, so what slows all cancels.
2. Its excess is the trimmed mean of these over the steps (`_trimmed_mean`).
3. Its variance is the noise of that mean, which may linger from step to step, plus the variance between healthy machines: at
   least HEALTHY^2, more where peers show more (`_pooled`, `_apart`).
4. The excess over the root of that variance is a Student's t, because the noise is estimated (`_inverse_freedom`); the score is
   the normal deviate as rare as that (`_normal_deviate`).
5. A rank is called if any healthy rank of a run would reach its score in at most FALSE_CALLS of all windows: the more ranks, the
   higher (Bonferroni, `_critical`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from recipes.common.anomalies.robust_window import MAD_TO_SD
from tools.throughput.timings import Timings

FALSE_CALLS = 1e-5  # of all windows, for all ranks together; 2e-5 for two ranks if noise lingers, of which 50 steps show little
HEALTHY, HEALTHY_WEIGHT = (
    0.003,
    8,
)  # standard deviation between healthy machines, and the degrees of freedom that this assumption counts as
TRIMMED = 0.15  # of the steps, at either end: costs little for normal noise, helps with heavy tails
LUCKY = 2.5  # times its peers' variance that a rank's noise may show by chance; a rank with more is noisier
LEAST_STEPS = 8
WINDOW_STEPS = 50
MANY_RANKS = 16
_CLIPPED = 0.9205  # part of the variance of normal noise that remains when clipped at two deviations


@dataclass(frozen=True, kw_only=True)
class Straggler:
    rank: int
    stage: int
    host: str
    compute_ms: float  # a step
    slower: float  # relative to its peers
    score: float  # a normal deviate
    called: bool
    gain_ms: float  # a step, if it were as fast as its peers


@dataclass(frozen=True)
class _Noise:
    """The variance that noise gives a rank's mean excess, as estimated from the steps."""

    variance: np.ndarray  # [..., ranks]
    freedom: np.ndarray  # [..., 1]: degrees of freedom of the estimate


def judge(compute: np.ndarray, judged: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (slower, score, called), each [..., ranks], for compute [..., steps, ranks]: times of ranks with the same work.

    judged: how many ranks share FALSE_CALLS; more than these ranks where they are part of a run.
    """
    ratios = np.log(np.maximum(compute, 1e-9))
    ratios = ratios - _peers_median(ratios)
    steps, ranks = ratios.shape[-2:]
    excess, own = _trimmed_mean(ratios)
    usual = np.median(own.variance, axis=-1, keepdims=True)
    noise = _pooled(own, usual)
    apart = _apart(excess, usual)
    size = _normal_deviate(excess**2 / (noise.variance + apart), _inverse_freedom(noise, apart))
    score = np.sign(excess) * size
    called = (score >= _critical(judged or ranks)) & (steps >= LEAST_STEPS)
    return np.expm1(excess), score, called


def _critical(judged: int) -> float:
    """Return the score that the highest of so many healthy ranks reaches in FALSE_CALLS of all windows."""
    return -NormalDist().inv_cdf(FALSE_CALLS / judged)


def _trimmed_mean(ratios: np.ndarray) -> tuple[np.ndarray, _Noise]:
    """Return the mean [..., ranks] of ratios [..., steps, ranks], and its noise.

    By Tukey and McLaughlin (1963): of n steps, g are trimmed at either end; variance s^2 / (n (1 - 2 g / n)^2), where s^2 is that
    of the steps with those g clipped to the last that stays; n - 2 g - 1 degrees of freedom. Steps with lingering noise, of
    correlation r, are worth (1 - r) / (1 + r) as many (Bayley and Hammersley 1946); r is the median of the ranks'.
    """
    steps = ratios.shape[-2]
    trimmed = int(TRIMMED * steps)
    ordered = np.sort(ratios, axis=-2)
    mean = ordered[..., trimmed : steps - trimmed, :].mean(axis=-2)
    clipped = np.clip(ratios, ordered[..., trimmed, None, :], ordered[..., steps - trimmed - 1, None, :])
    clipped = clipped - clipped.mean(axis=-2, keepdims=True)
    squares = (clipped**2).sum(axis=-2)
    linger = (clipped[..., 1:, :] * clipped[..., :-1, :]).sum(axis=-2) / np.maximum(squares, 1e-30)
    linger = np.median(linger, axis=-1, keepdims=True)
    linger = np.clip(linger + (1 + 4 * linger) / steps, 0.0, 0.8)  # few steps show too little of it (Marriott and Pope 1954)
    fewer = (1 + linger) / (1 - linger)
    variance = squares / max(steps - 1, 1) / (steps * (1 - 2 * trimmed / steps) ** 2) * fewer
    return mean, _Noise(variance, max(steps - 2 * trimmed - 1, 1) / fewer)


def _pooled(own: _Noise, usual: np.ndarray) -> _Noise:
    """Return the ranks' median noise, `usual`, since the same work makes the same noise; its own for a plainly noisier rank."""
    ranks = own.variance.shape[-1]
    worth = max(1.0, (ranks - 1) * 2 / np.pi)  # a median over ranks is worth 2 / pi of their steps
    return _Noise(np.where(own.variance > LUCKY * usual, own.variance, usual), own.freedom * worth)


def _inverse_freedom(noise: _Noise, apart: np.ndarray) -> np.ndarray:
    """Return 1 / degrees of freedom of the estimate noise + apart, by Satterthwaite (1946); only the noise is uncertain.

    The noise counts two deviations above its estimate: one that is too low would make the sum look certain.
    """
    most = noise.variance * (1 + 2 * np.sqrt(2 / noise.freedom))
    return np.maximum((most / (most + apart)) ** 2 / noise.freedom, 1e-9)


def _normal_deviate(t_squared: np.ndarray, inverse_freedom: np.ndarray) -> np.ndarray:
    """Return the normal deviate as rare as Student's t: (8 f + 1) / (8 f + 3) sqrt(f log(1 + t^2 / f)) (Wallace 1959)."""
    return np.sqrt(np.log1p(t_squared * inverse_freedom) / inverse_freedom) * (8 + inverse_freedom) / (8 + 3 * inverse_freedom)


def _apart(center: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Return the variance [..., ranks] of a healthy rank's distance from its peers' median, without that of noise, `error`."""
    ranks = center.shape[-1]
    apart = HEALTHY**2 * np.ones_like(center)
    if ranks >= 4:  # as the others show it, without the rank itself
        seen = np.maximum(_over_peers(_spread, center) - error, 0.0)
        apart = np.maximum(apart, (HEALTHY_WEIGHT * apart + (ranks - 2) * seen) / (HEALTHY_WEIGHT + ranks - 2))
    # the peers' median has an error too: that of normal noise, exact for one peer and for many
    return apart * (1 + 1 / (1 + (ranks - 2) * 2 / np.pi))


def _spread(others: np.ndarray) -> np.ndarray:
    """Return the variance, robust to one slow rank: values are clipped at two deviations, by the median absolute one."""
    rest = others - np.median(others, axis=-1, keepdims=True)
    most = 2 * MAD_TO_SD * np.median(np.abs(rest), axis=-1, keepdims=True)
    return (np.clip(rest, -most, most) ** 2).mean(axis=-1) / _CLIPPED


def _peers_median(values: np.ndarray) -> np.ndarray:
    """Return the median [..., ranks] over the other ranks."""
    return _over_peers(lambda others: np.median(others, axis=-1), values)


def _over_peers(figure: Callable[[np.ndarray], np.ndarray], values: np.ndarray) -> np.ndarray:
    """Return the figure [..., ranks] of the other ranks; with many ranks, of all, since one hardly matters."""
    ranks = values.shape[-1]
    if ranks > MANY_RANKS:
        return np.repeat(figure(values)[..., None], ranks, axis=-1)
    return np.stack([figure(np.delete(values, rank, axis=-1)) for rank in range(ranks)], axis=-1)


def rank_stragglers(timings: Timings) -> list[Straggler]:
    """Return all ranks that have peers, the highest score first, over the last WINDOW_STEPS steps that every rank has."""
    common = set.intersection(*(set(rank.last_steps.tolist()) for rank in timings.ranks))
    kept = sorted(common)[-WINDOW_STEPS:]
    if not kept:
        return []
    times = {}
    for rank in timings.ranks:
        newest = dict(zip(rank.last_steps.tolist(), rank.compute().tolist(), strict=True))
        times[rank.rank] = np.array([newest[step] for step in kept])
    slowest = np.max(list(times.values()), axis=0)
    stages = [[rank for rank in timings.ranks if rank.stage == stage] for stage in range(timings.pipeline)]
    stages = [peers for peers in stages if len(peers) >= 2]
    judged = sum(map(len, stages))
    found = []
    for peers in stages:
        compute = np.stack([times[rank.rank] for rank in peers], axis=-1)
        slower, score, called = judge(compute, judged)
        usual = np.exp(_peers_median(np.log(np.maximum(compute, 1e-9))))
        for index, rank in enumerate(peers):
            rest = np.max([times[other] for other in times if other != rank.rank], axis=0)
            without = np.maximum(rest, np.minimum(usual[:, index], times[rank.rank]))
            found.append(
                Straggler(
                    rank=rank.rank,
                    stage=rank.stage,
                    host=rank.host,
                    compute_ms=float(np.median(compute[:, index])),
                    slower=float(slower[index]),
                    score=float(score[index]),
                    called=bool(called[index]),
                    gain_ms=float(np.median(slowest - without)),
                )
            )
    return sorted(found, key=lambda straggler: -straggler.score)
