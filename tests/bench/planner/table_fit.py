"""Fits the time model to tables of measured runs, and cross-validates fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from tools.plan.fitting import fit_map
from tools.plan.time_model import PRIOR, WIDTHS, Cases, step_seconds

EFFECT_WIDTH = 0.1  # how far kernels for one shape of layer differ from the terms; libraries choose them by shape
NOISE = 0.05


def take(cases: Cases, rows: np.ndarray) -> Cases:
    """Return only these rows."""
    columns = {field.name: getattr(cases, field.name) for field in fields(cases) if field.name != "keys"}
    return Cases(**{name: values[rows] for name, values in columns.items()}, keys=[cases.keys[row] for row in rows])


@dataclass(frozen=True)
class TimeFit:
    terms: np.ndarray
    effects: dict[tuple, float]  # layer shape -> factor; a shape never measured has 1

    def predict(self, cases: Cases) -> np.ndarray:
        return step_seconds(self.terms, cases, self.factors(cases))

    def factors(self, cases: Cases) -> np.ndarray:
        return np.array([self.effects.get(key, 1.0) for key in cases.keys])


FIRST_PRINCIPLES = TimeFit(PRIOR, {})


def fit_time(
    cases: Cases,
    seconds: np.ndarray,
    prior: np.ndarray = PRIOR,
    widths: np.ndarray = WIDTHS,
    effect_width: float = EFFECT_WIDTH,
) -> TimeFit:
    """Fit the terms and one factor for each shape of layer: libraries choose kernels by shape, in jumps that no term follows.

    The factors' prior holds them near 1, so that a single odd measurement does not become a rule.
    """
    shapes, place = distinct(cases.keys)
    count = len(prior)

    guesses = 2 * (count + len(shapes))  # of a derivative
    repeated = take(cases, np.repeat(np.arange(len(place)), guesses))

    def predict(x: np.ndarray) -> np.ndarray:
        """Predict all guesses as one long table, with each row once for every guess."""
        size = len(place), x.shape[1]
        terms = np.broadcast_to(x[:count, None, :], (count, *size)).reshape(count, -1)
        seconds = step_seconds(terms, cases if size[1] == 1 else repeated, x[count:][place].ravel())
        return seconds.reshape(size)

    start = np.concatenate([prior, np.ones(len(shapes))])
    wide = np.concatenate([widths, np.full(len(shapes), effect_width)])
    x = fit_map(predict, seconds, start, wide, noise=NOISE)
    return TimeFit(x[:count], dict(zip(shapes, x[count:].tolist(), strict=True)))


def folds(count: int, k: int, seed: int = 0) -> list[np.ndarray]:
    """Return the indices of `count` rows in `k` random parts of equal size. k >= count leaves one out at a time."""
    order = np.random.default_rng(seed).permutation(count)
    return [order[part::k] for part in range(min(k, count))]


def held_out(count: int, k: int, fit_and_predict: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """Return predictions [count], each by a fit that has not seen the row's fold: fit_and_predict(train rows, test rows)."""
    predicted = np.empty(count)
    for test in folds(count, k):
        train = np.setdiff1d(np.arange(count), test)
        predicted[test] = fit_and_predict(train, test)
    return predicted


def error_summary(predicted: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    """Return relative errors: mean, median, 90th percentile, largest, and bias (mean with sign)."""
    relative = predicted / measured - 1
    size = np.abs(relative)
    return {
        "rows": len(measured),
        "mean": float(size.mean()),
        "median": float(np.median(size)),
        "p90": float(np.percentile(size, 90)),
        "worst": float(size.max()),
        "bias": float(relative.mean()),
    }


def distinct(keys: Sequence[tuple]) -> tuple[list[tuple], np.ndarray]:
    """Return (the distinct keys, sorted; the index of each key among them)."""
    known = sorted(set(keys))
    place = {key: index for index, key in enumerate(known)}
    return known, np.array([place[key] for key in keys], dtype=int)
