"""The detector of a loss that resumes at another level."""

from __future__ import annotations

from statistics import median

import numpy as np

from recipes.common.anomalies.events import Event

RESUME_POINTS = 50  # a bump later than that has another cause
LEVEL_POINTS, LEVEL_Z = 16, 2.0  # the median of so many points is good to a third of a deviation


class ResumeLevel:
    """Whether the loss goes on after a resume where it was: too low, and the run reads again what it has read."""

    def __init__(self, center: float, fall: float, scale: float) -> None:
        """What the RobustWindow of the curve up to the checkpoint says."""
        self._center, self._fall, self._scale = center, fall, scale
        self._losses: list[float] = []
        self._first_step = 0

    def add(self, steps: np.ndarray, losses: np.ndarray) -> Event | None:
        """Points [n] in order. The event, once, when LEVEL_POINTS are seen and their median is off the curve before."""
        room = LEVEL_POINTS - len(self._losses)
        if room <= 0:
            return None
        if not self._losses:
            self._first_step = int(steps[0])
        self._losses += losses[:room].tolist()
        if len(self._losses) < LEVEL_POINTS:
            return None
        delta = median(self._losses) - self._center
        if -self._fall - LEVEL_Z * self._scale <= delta <= LEVEL_Z * self._scale:
            return None
        last = int(steps[room - 1])
        evidence = {"level_z": round(delta / self._scale, 2), "expected": round(self._center, 4)}
        return Event(self._first_step, self._first_step, last, delta, "resume_artefact", True, "loss", 0, evidence)
