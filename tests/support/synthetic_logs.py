"""Makes loss curves with known trouble: a power law with noise, as in healthy runs, and what is added to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

POINTS, NOISE = 8000, 0.03


def steps_of(points: int = POINTS, every: int = 1) -> np.ndarray:
    return np.arange(0, points * every, every)


def curve(steps: np.ndarray) -> np.ndarray:
    """Return the loss of a small language model: 11 at the start, 3.5 after 8000 steps."""
    return 2.0 + 9.0 * ((steps + 50) / 50) ** -0.35


def healthy_loss(seed: int = 0, points: int = POINTS, every: int = 1, noise: float = NOISE) -> np.ndarray:
    return curve(steps_of(points, every)) + noise * np.random.default_rng(seed).standard_normal(points)


def healthy_norm(seed: int = 0, points: int = POINTS) -> np.ndarray:
    steps = steps_of(points)
    return np.exp(
        np.log(0.3 + 3 * ((steps + 30) / 30) ** -0.8) + 0.12 * np.random.default_rng(seed + 1000).standard_normal(points)
    )


def bump(at: int, height: float, decay_points: float, points: int = POINTS) -> np.ndarray:
    """Return a jump at a point that decays."""
    after = np.arange(points) - at
    return np.where(after >= 0, height * np.exp(-np.maximum(after, 0) / decay_points), 0.0)


def write_log(path: Path, loss: np.ndarray, every: int = 1, **columns: np.ndarray) -> Path:
    """Write a CSV of steps, losses and other columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = np.stack([steps_of(len(loss), every), loss, *columns.values()], axis=1)
    np.savetxt(path, table, delimiter=",", header=",".join(["step", "loss", *columns]), comments="", fmt="%.6g")
    return path
