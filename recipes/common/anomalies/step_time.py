"""Finds steps that take longer, from one step on."""

from __future__ import annotations

import math

import numpy as np

from recipes.common.anomalies.curve import Curve, Points
from recipes.common.anomalies.events import Event, NewEvents
from recipes.common.anomalies.robust_window import RobustWindow

SLOW_Z, SLOW_SHARE = 3.0, 0.03  # a slow step: in robust deviations, and over the usual at least
SLOW_RUN, VERY_SLOW_RUN, VERY_SLOW = 5, 2, 2.0  # points in a row that open an event; fewer, of so many times SLOW_Z
LEAST_SECONDS = 1e-9  # a step that took less, or less than nothing, was not timed
SLOW_CALM, SLOW_KEPT = 16, 128  # points: that end it, after which slow is the new usual


class StepTime:
    """Judges the seconds of steps by their own window. The single slow step of a save or an evaluation is no event."""

    columns = ("seconds",)

    def __init__(self, curve: Curve) -> None:
        self._events = NewEvents()
        self._number = 0
        self._window = RobustWindow(prior=0.01, floor=0.005, least_unit=LEAST_SECONDS)
        self._window.begins_midway = True
        self._slow: list[tuple[int, float]] = []  # step and seconds: the run that may open an event, then all of the event's
        self._open = False
        self._calm, self._kept = 0, []

    def add(self, points: Points) -> list[Event]:
        known = np.isfinite(points.columns["seconds"]) & (points.columns["seconds"] >= LEAST_SECONDS)
        steps, seconds = points.steps[known], points.columns["seconds"][known]
        at = 0
        while at < len(seconds):
            n = self._usual(seconds[at:])
            if n:
                self._window.accept(seconds[at : at + n])
            else:
                self._push(int(steps[at]), float(seconds[at]))
            at += max(n, 1)
        return self._events.take()

    def resumed(self, step: int) -> list[Event]:
        return []

    def finish(self) -> list[Event]:
        self._end()
        return self._events.take()

    def _limit(self) -> float:
        window = self._window
        return window.center + max(SLOW_Z * window.scale, SLOW_SHARE * window.center) if window.ready else math.inf

    def _usual(self, seconds: np.ndarray) -> int:
        """Count how many of the next points may enter the window at once."""
        if self._slow:  # slow steps in a row, or an event that is open
            return 0
        slow = seconds[: self._window.due] > self._limit()
        return int(slow.argmax()) if slow.any() else len(slow)

    def _push(self, step: int, seconds: float) -> None:
        slow = seconds > self._limit()
        if slow:
            self._slow.append((step, seconds))
        if not self._open:
            if not slow:
                self._slow = []
                self._window.accept(np.array([seconds]))
            elif self._is_event():
                self._open, self._number, self._calm, self._kept = True, self._events.number(), 0, []
                self._events.append(self._event(ended=False))
            return
        self._kept.append(seconds)
        self._calm = 0 if slow else self._calm + 1
        if self._calm == SLOW_CALM or len(self._kept) == SLOW_KEPT:
            self._end()

    def _is_event(self) -> bool:
        """Whether the slow steps are too many, or too slow, for a save or an evaluation."""
        usual = self._window.center
        least = min(seconds for _, seconds in self._slow) - usual
        very_slow = least > SLOW_SHARE * usual and least > VERY_SLOW * SLOW_Z * self._window.scale
        return len(self._slow) >= SLOW_RUN or (very_slow and len(self._slow) >= VERY_SLOW_RUN)

    def _event(self, ended: bool) -> Event:
        (onset, _), (last, _) = self._slow[0], self._slow[-1]
        peak, longest = max(self._slow, key=lambda point: point[1])
        usual = self._window.center
        evidence = {"seconds_before": round(usual, 4), "slower": round(longest / usual - 1, 4), "points": len(self._slow)}
        end, lead = last if ended else None, peak - onset
        return Event(onset, peak, end, 0.0, "hardware_suspect", False, "step_time", lead, evidence, self._number)

    def _end(self) -> None:
        """Close the event: the slow steps ended, or lasted so long that they are the new usual."""
        if self._open:
            self._events.append(self._event(ended=True))
            if len(self._kept) == SLOW_KEPT:
                self._window.refill(np.array(self._kept))
        self._slow, self._open = [], False
