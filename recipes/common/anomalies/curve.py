"""Holds what the detectors read: stretches of logged points, and the healthy curve of loss and gradient norm so far."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from recipes.common.anomalies.robust_window import ENOUGH, RobustWindow

HISTORY = 1024  # accepted points kept for a step back to a checkpoint
LEAST_LOSS = 0.1  # nats: shares of a loss nearer to zero, or at it, are those of this one. A share of nothing is nothing


@dataclass
class Points:
    """Logged points [n] of one process, in order. `LossSpikes` fills the last three for the detectors after it."""

    steps: np.ndarray  # int64
    columns: dict[str, np.ndarray]  # fp64 by name: a missing value is NaN, one that was not finite is infinite
    sparse: np.ndarray  # bool: the log leaves out the steps on both sides
    after_gap: bool = False  # so many steps are missing before these that the earlier curve predicts nothing
    opened: np.ndarray = field(init=False)  # bool: a spike began here
    off_curve: np.ndarray = field(init=False)  # bool: loss or gradient norm off its curve
    new_level: np.ndarray = field(init=False)  # bool: from here on the loss follows another curve

    def __post_init__(self) -> None:
        self.opened, self.off_curve, self.new_level = np.zeros((3, len(self.steps)), dtype=bool)


@dataclass(frozen=True)
class Level:
    """Where the loss is expected: `center` give or take `scale`, or `fall` lower."""

    center: float
    fall: float
    scale: float


class Curve:
    """Windows of the last healthy losses and log gradient norms. `LossSpikes` keeps it; the other detectors may read it."""

    def __init__(self) -> None:
        self.loss = RobustWindow(prior=0.02, floor=0.001, least_unit=LEAST_LOSS, few=3)
        # a norm has to double (exp(8 * 0.1) = 2.2): logs round it, and single healthy steps reach 1.5 times the usual
        self.norm = RobustWindow(prior=0.15, floor=0.1, least_unit=None)
        self._history, self._kept = np.empty((3, 2 * HISTORY)), 0  # step, loss, log norm

    def begin(self, *, midway: bool) -> None:
        """Call before the first point. midway: the log begins in the middle of a run, and is judged at once."""
        self.loss.begins_midway = self.norm.begins_midway = midway

    def level(self) -> Level | None:
        """Return where the loss is expected; None while too little is known."""
        return Level(self.loss.center, self.loss.fall, self.loss.scale) if self.loss.count >= ENOUGH else None

    def healthy_points(self, losses: np.ndarray, norms: np.ndarray) -> int:
        """Count how many of the next points [n] are on their curves and may go to `accept`. norms: logs, NaN where unknown."""
        n = min(self.loss.due, len(losses))
        losses, norms = losses[:n], norms[:n]
        known = np.flatnonzero(~np.isnan(norms))
        if len(known) > self.norm.due:
            n = int(known[self.norm.due])
            losses, norms = losses[:n], norms[:n]
        off = ~((losses < self.loss.high) & (losses > self.loss.low) & (losses < np.inf))
        off |= (norms >= self.norm.high) | (norms == np.inf)
        return int(off.argmax()) if off.any() else n

    def accept(self, steps: np.ndarray, losses: np.ndarray, norms: np.ndarray) -> None:
        """Add points [n] that `healthy_points` counted."""
        self.loss.accept(losses)
        known = norms[~np.isnan(norms)]
        if len(known):
            self.norm.accept(known)
        n = len(steps)
        if self._kept + n > 2 * HISTORY:
            self._history[:, :HISTORY] = self._history[:, self._kept - HISTORY : self._kept]
            self._kept = HISTORY
        self._history[:, self._kept : self._kept + n] = steps, losses, norms
        self._kept += n

    def rewind(self, step: int) -> None:
        """Forget the points after `step`."""
        known = self._history[:, max(self._kept - HISTORY, 0) : self._kept]
        known = known[:, known[0] <= step]
        norms = known[2][~np.isnan(known[2])]
        for window, values in ((self.loss, known[1]), (self.norm, norms)):
            window.begins_midway = True
            window.refill(values)
        self._history[:, : known.shape[1]], self._kept = known, known.shape[1]

    def forget(self) -> None:
        """Start again from nothing: the points so far do not predict the next."""
        for window in (self.loss, self.norm):
            window.begins_midway = True
            window.refill(np.empty(0))
