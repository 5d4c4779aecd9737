"""What stands beside the loss in a log: seconds of the steps, the loss scale, the level after a resume."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from recipes.common.anomalies.events import Event
from recipes.common.anomalies.robust_window import RobustWindow

SLOW_Z, SLOW_SHARE = 3.0, 0.03  # a slow step: in robust deviations, and over the usual at least
SLOW_RUN, VERY_SLOW_RUN, VERY_SLOW = 5, 2, 2.0  # points in a row that open an event; fewer, of so many times SLOW_Z
SLOW_CALM, SLOW_KEPT = 16, 128  # points: that end it, after which slow is the new usual


Emit = Callable[[int, Event], None]  # an event's serial number, and what is known of it
Serial = Callable[[], int]


class StepTime:
    """Steps that take longer, from one on: not the single slow step of a save or an evaluation."""

    def __init__(self, emit: Emit, serial: Serial) -> None:
        self._emit, self._serial = emit, serial
        self._window = RobustWindow(prior=0.01, floor=0.005, relative=True)
        self._window.begins_midway = True
        self._slow: list[tuple[int, float]] = []  # step and seconds: the run that may open an event, then all of the event's
        self._open_serial: int | None = None
        self._calm, self._kept = 0, []

    def add(self, steps: np.ndarray, seconds: np.ndarray) -> None:
        """Points [n] in order; NaN where unknown."""
        known = np.isfinite(seconds)
        steps, seconds = steps[known], seconds[known]
        at = 0
        while at < len(seconds):
            n = self._usual(seconds[at:])
            if n:
                self._window.accept(seconds[at : at + n])
            else:
                self._push(int(steps[at]), float(seconds[at]))
            at += max(n, 1)

    def _limit(self) -> float:
        window = self._window
        return window.center + max(SLOW_Z * window.scale, SLOW_SHARE * window.center) if window.ready else math.inf

    def _usual(self, seconds: np.ndarray) -> int:
        """How many of the next points may enter the window at once."""
        if self._slow:  # slow steps in a row, or an event that is open
            return 0
        slow = seconds[: self._window.due] > self._limit()
        return int(slow.argmax()) if slow.any() else len(slow)

    def _push(self, step: int, seconds: float) -> None:
        slow = seconds > self._limit()
        if slow:
            self._slow.append((step, seconds))
        if self._open_serial is None:
            if not slow:
                self._slow = []
                self._window.accept(np.array([seconds]))
            elif self._is_event():
                self._open_serial, self._calm, self._kept = self._serial(), 0, []
                self._emit(self._open_serial, self._event(ended=False))
            return
        self._kept.append(seconds)
        self._calm = 0 if slow else self._calm + 1
        if self._calm == SLOW_CALM or len(self._kept) == SLOW_KEPT:
            self.end()

    def _is_event(self) -> bool:
        """One slow step is a save or an evaluation."""
        usual = self._window.center
        least = min(seconds for _, seconds in self._slow) - usual
        very_slow = least > SLOW_SHARE * usual and least > VERY_SLOW * SLOW_Z * self._window.scale
        return len(self._slow) >= SLOW_RUN or (very_slow and len(self._slow) >= VERY_SLOW_RUN)

    def _event(self, ended: bool) -> Event:
        (onset, _), (last, _) = self._slow[0], self._slow[-1]
        peak, longest = max(self._slow, key=lambda point: point[1])
        usual = self._window.center
        evidence = {"seconds_before": round(usual, 4), "slower": round(longest / usual - 1, 4), "points": len(self._slow)}
        return Event(onset, peak, last if ended else None, 0.0, "hardware_suspect", False, "step_time", peak - onset, evidence)

    def end(self) -> None:
        """The slow steps end, or have lasted so long that they are the new usual."""
        if self._open_serial is not None:
            self._emit(self._open_serial, self._event(ended=True))
            if len(self._kept) == SLOW_KEPT:
                self._window.refill(np.array(self._kept))
        self._slow, self._open_serial = [], None
