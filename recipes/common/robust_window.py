"""Level and spread of a noisy curve from its last healthy values: medians, so that what is odd does not move them.

The curve's fall is taken out first, by the line through the medians of the window's older and newer half. A rise is not:
it is what the detectors look for. Values the detectors flag are never put in ("quarantine"), so one spike or NaN cannot
hide the next; means and deviations of raw values, the usual rule, are blind for a whole window after each.
"""

from __future__ import annotations

import numpy as np

SIZE = 128  # values: long enough for a spread within 10 %, short against the changes of a healthy curve
REFRESH = 16  # values between two estimates: one costs some 20 microseconds
ENOUGH = 16  # values, before a run that begins is judged at all
YOUNG = 1024  # values: the part of a run in which no value is too low
OPEN_Z = 8.0  # robust deviations off the curve: beyond the tail of every healthy log we have, but for single hard batches
MAD_TO_SD = 1.4826  # of a normal distribution


class RobustWindow:
    """What the next value should be, from at most SIZE accepted ones: `center`, give or take `scale`, or `fall` lower."""

    def __init__(self, prior: float, floor: float, relative: bool) -> None:
        """prior: the scale to expect before values tell; floor: the least scale; both in shares of the center if `relative`."""
        self._prior, self._floor, self._relative = prior, floor, relative
        self.begins_midway = False  # the first value was not the run's first: judge from the third on, by the prior
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
        return self.count >= ENOUGH or (self.begins_midway and self.count >= 2)

    def z(self, value: float) -> float:
        """Robust deviations off the curve; 0 while too little is known.

        A value is high when it is above what was just there, and low when it is below where the fall would have led:
        the fall of a young run slows down all the time, so a line drawn on is too low for it.
        """
        if not self.ready:
            return 0.0
        return (max(value - self.center, 0.0) + min(value - self.center + self.fall, 0.0)) / self.scale

    def accept(self, values: np.ndarray) -> None:
        """Values [n] in order, n at most `due`: the estimates hold until then."""
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
        n, half = self.count, self.count // 2
        values = self._buffer[self._end - n : self._end]
        self.due = min(max(n // 8, 1), REFRESH)
        older, newer, newest = np.sort(values[:half]), np.sort(values[half:]), np.sort(values[-max(n // 4, 1) :])
        slope = min((newer[len(newer) // 2] - older[half // 2]) / half, 0.0) if n >= ENOUGH else 0.0
        line = newer[len(newer) // 2] + slope * (np.arange(n) - 0.75 * n)
        spread = MAD_TO_SD * np.sort(np.abs(values - line))[n // 2]
        self.center = float(newest[len(newest) // 2])
        self.fall = float(-slope * (0.125 * n + self.due))
        unit = abs(self.center) if self._relative else 1.0
        if n < SIZE // 4:  # as if the prior had been seen in four values
            spread = np.sqrt((n * spread**2 + 4 * (self._prior * unit) ** 2) / (n + 4))
        else:  # rounded values: steps of the last digit are no deviation
            gaps = np.diff(newer)
            gaps = gaps[gaps > 0]
            spread = max(spread, gaps.min() if len(gaps) else 0.0)
        self.scale = float(max(spread, self._floor * unit))
        if self.ready:
            self.high = self.center + OPEN_Z * self.scale
            # a young run may fall at any speed
            old = self.begins_midway or self._accepted >= YOUNG
            self.low = self.center - self.fall - OPEN_Z * self.scale if old else -np.inf
