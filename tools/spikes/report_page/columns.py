"""Packs the numbers of a report: float32 series, their bytes sorted by significance, deflated, and base64 in the page."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np

MAX_POINTS = 1_000_000  # of a series; a longer one keeps the lowest and highest point of each block


class Columns:
    """Collects 4-byte columns; the JSON of the page says at which index each one begins."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._at = 0

    def series(self, steps: np.ndarray, values: np.ndarray) -> dict[str, Any]:
        """Add values [n] at steps [n], NaN where missing, and return where they lie: {"x": ..., "y": ...}."""
        values = np.where(np.isfinite(values), values, np.nan).astype(np.float32)
        known = ~np.isnan(values)
        if known.mean() < 0.5:  # rare values take less room without their gaps
            steps, values = steps[known], values[known]
        steps, values = extremes(steps, values, MAX_POINTS)
        return {"x": self._steps(steps), "y": self._add(values)}

    def encoded(self) -> str:
        """Return all columns as text, the most significant bytes first: exponents repeat, and deflate finds that."""
        words = np.concatenate(self._parts) if self._parts else np.zeros(0, np.uint32)
        planes = words.view(np.uint8).reshape(-1, 4).T.tobytes()
        return base64.b64encode(zlib.compress(planes, 1)).decode()

    def _steps(self, steps: np.ndarray) -> dict[str, int]:
        strides = np.diff(steps)
        if not strides.size or (strides == strides[0]).all():
            start, stride = (int(steps[0]) if steps.size else 0), (int(strides[0]) if strides.size else 1)
            return {"start": start, "stride": stride, "length": len(steps)}
        return self._add(steps.astype(np.int32))

    def _add(self, column: np.ndarray) -> dict[str, int]:
        place = {"at": self._at, "length": len(column)}
        self._parts.append(np.ascontiguousarray(column).view(np.uint32))
        self._at += len(column)
        return place


def extremes(steps: np.ndarray, values: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return at most about `most` points: the lowest and highest of every block, each at its own step. No peak is lost."""
    if len(values) <= most:
        return steps, values
    size = -(-2 * len(values) // most)
    whole = len(values) // size * size
    blocks = values[:whole].reshape(-1, size)
    low = np.where(np.isnan(blocks), np.inf, blocks).argmin(axis=1)
    high = np.where(np.isnan(blocks), -np.inf, blocks).argmax(axis=1)
    chosen = np.sort(np.stack([low, high], axis=1), axis=1) + np.arange(len(blocks))[:, None] * size
    index = np.unique(np.concatenate([chosen.ravel(), np.arange(whole, len(values))]))
    return steps[index], values[index]
