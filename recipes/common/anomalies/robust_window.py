"""Estimates level and spread of a noisy curve from its last healthy values by medians, so that outliers do not shift them.

The curve's fall is removed first, by the line through the medians of the window's quarters. A rise is not: it is what the
detectors look for. Values that the detectors flag never enter ("quarantine"), so one spike or NaN cannot hide the next; means and
deviations of raw values, the usual rule, are blind for a whole window after each.
"""

from __future__ import annotations

import numpy as np

SIZE = 128  # values: long enough for a spread within 10 %, short against the changes of a healthy curve
REFRESH = 16  # values between two estimates: one costs some 20 microseconds
ENOUGH = 16  # values, before a run that begins is judged at all
YOUNG = 1024  # values: the part of a run in which no value is too low
OPEN_Z = 8.0  # robust deviations off the curve: beyond the tail of every healthy log we have, but for single hard batches
MAD_TO_SD = 1.4826  # from a median absolute deviation to a standard deviation, for normal noise


class RobustWindow:
    """Predicts the next value from at most SIZE accepted ones: `center`, give or take `scale`, or `fall` lower."""

    def __init__(self, prior: float, floor: float, least_unit: float | None, few: int = 1) -> None:
        """prior: the scale to expect while values are few; floor: the least scale; both in shares of the center's size, or of
        `least_unit` where the center is nearer to zero. Without a `least_unit` they are absolute.

        few: values that are enough, with the prior, for a log that begins in the middle of a run.
        """
        self._prior, self._floor, self._least_unit, self._few = prior, floor, least_unit, few
        self.begins_midway = False
        self._accepted = 0
        self.refill(np.empty(0))

    def refill(self, values: np.ndarray) -> None:
        """Forget all, then accept the last SIZE of `values`."""
        values = values[-SIZE:]
        self._buffer = np.empty(2 * SIZE)
        self._buffer[: len(values)] = values
        self._end = self.count = len(values)
        self.center, self.scale, self.fall, self.due = np.nan, np.inf, 0.0, 1
        self.low, self.high = -np.inf, np.inf  # OPEN_Z scales away
        if self.count:
            self._refresh()

    @property
    def ready(self) -> bool:
        return self.count >= (1 if self.begins_midway else ENOUGH)

    def z(self, value: float) -> float:
        """Return the robust deviations off the curve; 0 while too little is known.

        A value is high when it is above what was just there, and low when it is below where the fall would have led:
        the fall of a young run slows down all the time, so a line drawn on is too low for it.
        """
        if not self.ready:
            return 0.0
        return (max(value - self.center, 0.0) + min(value - self.center + self.fall, 0.0)) / self.scale

    def accept(self, values: np.ndarray) -> None:
        """Add values [n] in order, n at most `due`: the estimates hold until then."""
        n = len(values)
        if self._end + n > 2 * SIZE:
            self._buffer[:SIZE] = self._buffer[self._end - SIZE : self._end]
            self._end = SIZE
        self._buffer[self._end : self._end + n] = values
        self._end += n
        self._accepted += n
        self.count = min(self.count + n, SIZE)
        self.due -= n
        if self.due <= 0:
            self._refresh()

    def _refresh(self) -> None:
        n, quarter = self.count, self.count // 4
        values = self._buffer[self._end - n : self._end]
        self.due = min(max(n // 8, 1), REFRESH)
        if n < ENOUGH:
            newest = np.sort(values[-max(quarter, 1) :])
            self.center, self.fall, line = float(newest[len(newest) // 2]), 0.0, newest[len(newest) // 2]
        else:
            newest = np.sort(values[n - 4 * quarter :].reshape(4, quarter), axis=1)
            knots = np.maximum.accumulate(newest[::-1, quarter // 2])[::-1]
            line = np.interp(np.arange(n), n - quarter * (np.arange(3.5, 0, -1)), knots)
            self.center = float(newest[-1, quarter // 2])
            self.fall = float((knots[0] - knots[3]) / (3 * quarter) * (0.5 * quarter + self.due))
        spread = MAD_TO_SD * np.sort(np.abs(values - line))[n // 2]
        unit = 1.0 if self._least_unit is None else max(abs(self.center), self._least_unit)
        if n < SIZE // 4:  # as if four values had shown the prior
            spread = np.sqrt((n * spread**2 + 4 * (self._prior * unit) ** 2) / (n + 4))
        else:  # rounded values: steps of the last digit are no deviation
            gaps = np.diff(newest[-1])
            gaps = gaps[gaps > 0]
            spread = max(spread, gaps.min() if len(gaps) else 0.0)
        self.scale = float(max(spread, self._floor * unit))
        if self.count >= (self._few if self.begins_midway else ENOUGH):
            self.high = self.center + OPEN_Z * self.scale
            # a young run may fall at any speed
            old = self.begins_midway or self._accepted >= YOUNG
            self.low = self.center - self.fall - OPEN_Z * self.scale if old else -np.inf
