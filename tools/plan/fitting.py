"""Fit a model of physical terms to measurements: every coefficient is positive and starts from a figure of its own.

Coefficients are found in logarithms, with a normal prior of stated width around a data sheet's or a formula's value, and
relative errors under a robust loss (pseudo-Huber). So a table of a thousand rows decides every term, two rows move only those
that matter for them, and none at all leaves the first principles. Levenberg-Marquardt, numpy only.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Predict = Callable[[np.ndarray], np.ndarray]  # coefficients [k, m], m guesses -> predictions [n, m]


def fit_map(
    predict: Predict, measured: np.ndarray, prior: np.ndarray, widths: np.ndarray, *, noise: float, rounds: int = 40
) -> np.ndarray:
    """Coefficients [k] that best explain `measured` [n] (positive). Deterministic.

    prior: [k], positive. widths: [k], standard deviations of log(coefficient).
    noise: relative error of a single measurement; past it the loss grows linearly, so that an outlier does not lead.
    """
    start, target, deviations = np.log(prior)[:, None], np.log(measured)[:, None], widths[:, None]

    def residuals(guesses: np.ndarray) -> np.ndarray:
        relative = (np.log(predict(np.exp(guesses))) - target) / noise
        robust = np.sign(relative) * np.sqrt(2.0 * (np.sqrt(1.0 + relative**2) - 1.0))
        return np.concatenate([robust, (guesses - start) / deviations])

    x, damping = np.log(prior), 1e-2
    now = residuals(x[:, None])[:, 0]
    for _ in range(rounds):
        jacobian = _jacobian(residuals, x)
        normal, gradient = jacobian.T @ jacobian, jacobian.T @ now
        while True:
            step = np.clip(-np.linalg.solve(normal + damping * np.diag(np.diag(normal)), gradient), -1.0, 1.0)
            then = residuals((x + step)[:, None])[:, 0]
            if then @ then < now @ now:
                break
            damping *= 4
            if damping > 1e8:
                return np.exp(x)
        gain = 1 - (then @ then) / (now @ now)
        x, now, damping = x + step, then, max(damping / 3, 1e-7)
        if gain < 1e-6:
            break
    return np.exp(x)


def _jacobian(residuals: Callable[[np.ndarray], np.ndarray], x: np.ndarray, step: float = 1e-4) -> np.ndarray:
    """Return the derivatives at `x`; all guesses in one call: a call costs more than a few hundred predictions."""
    shifts = step * np.eye(len(x))
    found = residuals(np.hstack([x[:, None] + shifts, x[:, None] - shifts]))
    return (found[:, : len(x)] - found[:, len(x) :]) / (2 * step)
