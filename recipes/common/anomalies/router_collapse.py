"""Finds mixtures whose routers send most tokens to few of their experts."""

from __future__ import annotations

import numpy as np

from recipes.common.anomalies.curve import Curve, Points
from recipes.common.anomalies.events import Event, NewEvents

COLLAPSED, RECOVERED = 0.5, 0.6  # evenness of the worst router's loads (1: all equal; 0: all tokens to the same few experts)
COLLAPSED_RUN, RECOVERED_RUN = 20, 20  # points in a row that open an event, and that end it


class RouterCollapse:
    """Judges the evenness of the experts' loads. It is uneven for some steps after a random start: only a run of them counts."""

    columns = ("load_evenness",)

    def __init__(self, curve: Curve) -> None:
        self._events = NewEvents()
        self._forget()

    def _forget(self) -> None:
        self._number = 0
        self._low: list[tuple[int, float]] = []  # step and evenness of the points in a row below COLLAPSED; then of the event
        self._open, self._calm = False, 0

    def add(self, points: Points) -> list[Event]:
        values = points.columns["load_evenness"]
        for index in np.flatnonzero(np.isfinite(values)).tolist():
            self._push(int(points.steps[index]), float(values[index]))
        return self._events.take()

    def resumed(self, step: int) -> list[Event]:
        """An event that is open stays one of the log; what comes is judged anew."""
        if self._open:
            self._events.append(self._event(ended=True))
        self._forget()
        return self._events.take()

    def finish(self) -> list[Event]:
        if self._open:
            self._events.append(self._event(ended=False))
        return self._events.take()

    def _push(self, step: int, evenness: float) -> None:
        if not self._open:
            self._low = [*self._low, (step, evenness)] if evenness < COLLAPSED else []
            if len(self._low) == COLLAPSED_RUN:
                self._open, self._calm, self._number = True, 0, self._events.number()
                self._events.append(self._event(ended=False))
            return
        self._calm = self._calm + 1 if evenness >= RECOVERED else 0
        if evenness < COLLAPSED:  # of a collapse that lasts, the ends and the lowest point are all that is told
            lowest = min((*self._low, (step, evenness)), key=lambda point: point[1])
            self._low = [self._low[0], lowest, (step, evenness)]
        if self._calm == RECOVERED_RUN:
            self._events.append(self._event(ended=True))
            self._open, self._low = False, []

    def _event(self, *, ended: bool) -> Event:
        onset, last = self._low[0][0], self._low[-1][0]
        peak, lowest = min(self._low, key=lambda point: point[1])
        evidence = {"load_evenness": round(lowest, 4)}
        end, lead = last if ended else None, peak - onset
        return Event(onset, peak, end, 0.0, "router_collapse", True, "load_evenness", lead, evidence, self._number)
