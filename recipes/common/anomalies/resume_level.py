"""Compares the loss after a resume with the curve before it: a level that is too low reads again what it has read."""

from __future__ import annotations

from statistics import median

from recipes.common.anomalies.curve import Curve, Level, Points
from recipes.common.anomalies.events import Event

LEVEL_POINTS, LEVEL_Z = 16, 2.0  # the median of so many points is good to a third of a deviation


class ResumeLevel:
    """Judges the first LEVEL_POINTS after each resume, unless a spike among them already says that the loss is higher."""

    columns = ("loss",)

    def __init__(self, curve: Curve) -> None:
        self._curve = curve
        self._expected: Level | None = None  # while points are collected
        self._losses: list[float] = []
        self._first_step, self._spiked, self._number = 0, False, 0

    def add(self, points: Points) -> list[Event]:
        room = LEVEL_POINTS - len(self._losses)
        if self._expected is None:
            return []
        if not self._losses:
            self._first_step = int(points.steps[0])
        self._losses += points.columns["loss"][:room].tolist()
        self._spiked = self._spiked or bool(points.opened[:room].any())
        if len(self._losses) < LEVEL_POINTS:
            return []
        expected, self._expected = self._expected, None
        delta = median(self._losses) - expected.center
        if -expected.fall - LEVEL_Z * expected.scale <= delta <= LEVEL_Z * expected.scale or (self._spiked and delta > 0):
            return []
        self._number += 1
        first, last = self._first_step, int(points.steps[room - 1])
        evidence = {"level_z": round(delta / expected.scale, 2), "expected": round(expected.center, 4)}
        return [Event(first, first, last, delta, "resume_artefact", True, "loss", 0, evidence, self._number)]

    def resumed(self, step: int) -> list[Event]:
        self._expected, self._losses, self._spiked = self._curve.level(), [], False
        return []

    def finish(self) -> list[Event]:
        return []
