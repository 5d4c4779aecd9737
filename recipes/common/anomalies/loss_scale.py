"""Follows a dynamic fp16 loss scale: how far it fell, and since when. `loss_spikes` judges it with the loss."""

from __future__ import annotations

import math

SCALE_FALL, SCALE_DEEP_FALL = 8.0, 32.0  # three halvings, five
SCALE_LEAD_FALL, SCALE_POINTS = 4.0, 64  # what counts as a first signal; the longest time between halvings, or before the loss
SCALE_SETTLED = 16  # points without a fall: the search for the first scale is over


class LossScale:
    """Falls of the loss scale. The search for the first one, from 2**16 or 2**32 down, is none."""

    def __init__(self) -> None:
        self.value = math.nan
        self._settled = False
        self._changed = 0  # point of the last change
        self._fell = -SCALE_POINTS - 1  # point of the last fall
        self._top, self._onset = math.nan, 0  # before the falls in a row, and the step of the first

    def push(self, point: int, step: int, value: float) -> float:
        """Return how many times lower it is than before the falls in a row; 1 where it did not fall now. value: above zero."""
        before, self.value = self.value, value
        if math.isnan(before) or value == before:
            return 1.0
        self._settled = self._settled or value > before or point - self._changed >= SCALE_SETTLED
        self._changed = point
        if value > before or not self._settled:
            return 1.0
        if point - self._fell > SCALE_POINTS:
            self._top, self._onset = before, step
        self._fell = point
        return self._top / value

    def recent_fall(self, point: int) -> tuple[int, float]:
        """Return the step of the first fall in a row and its depth, where that ended SCALE_POINTS ago at most; else (0, 1)."""
        if point - self._fell > SCALE_POINTS:
            return 0, 1.0
        return self._onset, self._top / self.value
