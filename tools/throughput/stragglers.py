"""Which rank is slow by its own work, and what the run would gain without it.

A rank is held against its peers: the ranks of its stage, which compute the same. Only computing counts, so waiting for a slow
rank makes nobody slow. Each step gives each rank the logarithm of its time over its peers' median, so what slows a whole step
(a batch, a save) cancels. A rank's excess is the trimmed mean of these over the steps. Its score counts the excess in standard
errors: of a mean of noise that lingers from step to step, and of how far apart healthy machines are, at least HEALTHY, and more
where peers show more. The noise is estimated, so the count is Student's; the score is the normal deviate as rare as that.
A rank is called if a score as high would come from any of the healthy ranks of a run once in 1 / FALSE_CALLS windows at most:
the more ranks, the higher (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from recipes.common.anomalies.robust_window import MAD_TO_SD
from tools.throughput.timings import Timings

FALSE_CALLS = 1e-5  # a window, of all ranks together; 2e-5 for two ranks if noise lingers, of which 50 steps show little
HEALTHY, HEALTHY_WEIGHT = 0.003, 8  # deviation between healthy machines, and as how many degrees of freedom that counts
TRIMMED = 0.15  # of the steps, at either end: hardly dearer than a mean for normal noise, cheaper for heavy tails
LUCKY = 2.5  # times its peers' variance a rank's noise may show in a window by luck; with more it is the noisier
LEAST_STEPS = 8
WINDOW_STEPS = 50
MANY_RANKS = 16
_CLIPPED = 0.9205  # of the variance of normal noise is left if it is clipped at two deviations


@dataclass(frozen=True, kw_only=True)
class Straggler:
    rank: int
    stage: int
    host: str
    compute_ms: float  # a step
    slower: float  # than its peers, as a share
    score: float  # a normal deviate
    called: bool
    gain_ms: float  # of a step, were it as its peers


def judge(compute: np.ndarray, judged: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(slower, score, called), each [..., ranks], of compute [..., steps, ranks]: times of ranks that do the same work.

    `judged` ranks share FALSE_CALLS: these, or more where they are part of a run.
    """
    ratios = np.log(np.maximum(compute, 1e-9))
    ratios = ratios - _peers_median(ratios)
    steps, ranks = ratios.shape[-2:]
    center, error, freedom = _trimmed_mean(ratios)
    # the same work makes the same noise, so all ranks tell how much; but a rank that is plainly noisier has its own
    usual = np.median(error, axis=-1, keepdims=True)
    freedom = freedom * max(1.0, (ranks - 1) * 2 / np.pi)  # 2 / pi: what of each rank's steps a median over ranks is worth
    error = np.where(error > LUCKY * usual, error, usual)
    apart = _apart(center, usual)
    # only the noise is uncertain, HEALTHY is assumed: the freedom of such a sum by Satterthwaite (1946), here its inverse. The
    # noise counts here as two deviations above its estimate: one that is too low would make the sum look certain
    most = error * (1 + 2 * np.sqrt(2 / freedom))
    uncertain = np.maximum((most / (most + apart)) ** 2 / freedom, 1e-9)
    # from Student's to a normal deviate by Wallace (1959)
    size = np.sqrt(np.log1p(center**2 / (error + apart) * uncertain) / uncertain) * (8 + uncertain) / (8 + 3 * uncertain)
    score = np.sign(center) * size
    called = (score >= _critical(judged or ranks)) & (steps >= LEAST_STEPS)
    return np.expm1(center), score, called


def _critical(judged: int) -> float:
    """The score that the highest of so many healthy ranks reaches in FALSE_CALLS of all windows."""
    return -NormalDist().inv_cdf(FALSE_CALLS / judged)


def _trimmed_mean(ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean [..., ranks], its variance [..., ranks], degrees of freedom of that [..., 1]) of ratios [..., steps, ranks].

    By Tukey and McLaughlin (1963): of n steps, g go at either end; variance s^2 / (n (1 - 2 g / n)^2), s^2 that of the steps with
    those g held at the last that stays; n - 2 g - 1 degrees. Lingering noise, of correlation r from a step to the next, is worth
    (1 - r) / (1 + r) as many steps (Bayley and Hammersley 1946); r is the median of the ranks'.
    """
    steps = ratios.shape[-2]
    cut = int(TRIMMED * steps)
    ordered = np.sort(ratios, axis=-2)
    mean = ordered[..., cut : steps - cut, :].mean(axis=-2)
    held = np.clip(ratios, ordered[..., cut, None, :], ordered[..., steps - cut - 1, None, :])
    held = held - held.mean(axis=-2, keepdims=True)
    squares = (held**2).sum(axis=-2)
    linger = (held[..., 1:, :] * held[..., :-1, :]).sum(axis=-2) / np.maximum(squares, 1e-30)
    linger = np.median(linger, axis=-1, keepdims=True)
    linger = np.clip(linger + (1 + 4 * linger) / steps, 0.0, 0.8)  # few steps show too little of it (Marriott and Pope 1954)
    fewer = (1 + linger) / (1 - linger)
    variance = squares / max(steps - 1, 1) / (steps * (1 - 2 * cut / steps) ** 2) * fewer
    return mean, variance, max(steps - 2 * cut - 1, 1) / fewer


def _apart(center: np.ndarray, error: np.ndarray) -> np.ndarray:
    """[..., ranks]: the variance of a healthy rank's distance from the middle of its peers, less the noise's part, `error`."""
    ranks = center.shape[-1]
    apart = HEALTHY**2 * np.ones_like(center)
    if ranks >= 4:  # as the others show it, the rank itself not counting
        seen = np.maximum(_over_peers(_spread, center) - error, 0.0)
        apart = np.maximum(apart, (HEALTHY_WEIGHT * apart + (ranks - 2) * seen) / (HEALTHY_WEIGHT + ranks - 2))
    # the middle has an error, too: of a median of normal noise, exact for one peer and for many
    return apart * (1 + 1 / (1 + (ranks - 2) * 2 / np.pi))


def _spread(others: np.ndarray) -> np.ndarray:
    """The variance, one slow rank more or less: beyond two deviations, as the median shows them, nothing counts more."""
    rest = others - np.median(others, axis=-1, keepdims=True)
    most = 2 * MAD_TO_SD * np.median(np.abs(rest), axis=-1, keepdims=True)
    return (np.clip(rest, -most, most) ** 2).mean(axis=-1) / _CLIPPED


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
