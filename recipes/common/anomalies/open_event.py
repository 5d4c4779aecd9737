"""Collects what is known of a spike that has not ended: peaks, streaks of points off the curve, the last losses."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median

from recipes.common.anomalies.curve import LEAST_LOSS
from recipes.common.anomalies.events import DIVERGED_POINTS, Event

OFF_Z = 4.0  # still off: half of what opens
NEGLIGIBLE = 0.05  # of the event's largest excess: so near is back, though a very smooth curve makes it many deviations
QUARTER = DIVERGED_POINTS // 4


@dataclass
class Streak:
    """Points in a row for which something held: up to now, and the longest so far."""

    now: int = 0
    longest: int = 0

    def count(self, holds: bool) -> None:
        self.now = self.now + 1 if holds else 0
        self.longest = max(self.longest, self.now)


@dataclass
class OpenEvent:
    """A spike that lasts. Streaks and counts are in points."""

    # what it is
    number: int
    onset_step: int
    first_signal: str
    level: float  # the loss that was expected at the onset
    after_resume: bool
    sign: int = 1  # -1: the loss is too low
    kind: str = "outlier_batch"
    actionable_step: int | None = None
    # peaks
    peak_step: int = 0
    norm_peak_step: int = 0
    loss_z: float = 0.0  # largest, in the event's direction
    norm_z: float = 0.0
    excess: float = 0.0  # of the loss at its peak, in the event's direction
    scale_fall: float = 1.0
    # streaks
    points: int = 0
    off: Streak = field(default_factory=Streak)  # loss or norm
    loss_off: Streak = field(default_factory=Streak)
    norm_off: Streak = field(default_factory=Streak)
    not_finite: Streak = field(default_factory=Streak)
    calm: int = 0  # points since the last one off
    last_off_step: int = 0
    last_norm_off: int = 0  # in points
    norm_known: bool = False
    # the level it may have moved to
    losses: list[float] = field(default_factory=list)  # the last QUARTER finite ones
    early: float = math.nan  # median of the first QUARTER
    largest_median: float = 0.0

    @property
    def loss_size(self) -> float:
        """Return what shares of the loss are shares of; NaN where the level is not known."""
        return max(abs(self.level), LEAST_LOSS)

    def add(self, step: int, loss: float, *, excess: float, loss_z: float, norm_z: float) -> bool:
        """Count one point and return whether it is off the curve.

        excess: of the loss over the curve, in nats. loss_z, norm_z: robust deviations, infinite where not finite.
        """
        not_finite = loss_z == math.inf or norm_z == math.inf
        z, excess = self.sign * loss_z, self.sign * excess
        loss_off = z == math.inf or (z >= OFF_Z and excess > NEGLIGIBLE * self.excess)
        norm_off = norm_z >= OFF_Z
        off = loss_off or norm_off
        self.points += 1
        for run, holds in ((self.not_finite, not_finite), (self.loss_off, loss_off), (self.norm_off, norm_off), (self.off, off)):
            run.count(holds)
        self.calm = 0 if off else self.calm + 1
        if off:
            self.last_off_step = step
        if norm_off:
            self.last_norm_off = self.points
        if norm_z < math.inf and norm_z > self.norm_z:
            self.norm_z, self.norm_peak_step = norm_z, step
        if z < math.inf and z > self.loss_z:
            self.loss_z = z
        if not_finite and self.not_finite.longest == 1 and self.not_finite.now == 1:
            self.peak_step = step
        elif excess > self.excess and not self.not_finite.longest:
            self.excess, self.peak_step = excess, step
        if math.isfinite(loss):
            self.losses.append(loss)
            del self.losses[:-QUARTER]
            if math.isnan(self.early) and len(self.losses) == QUARTER:
                self.early = median(self.losses)
        return off

    def event(self, *, ended: bool) -> Event:
        """Return what is known so far. `ended` fixes the end at the last point off the curve."""
        moved = self.loss_z >= OFF_Z or self.not_finite.longest > 0
        peak_step = self.peak_step if moved else self.norm_peak_step
        delta = math.nan if self.not_finite.longest else self.sign * self.excess
        evidence = {"loss_z": round(self.sign * self.loss_z, 2), "grad_norm_z": round(self.norm_z, 2), "points": self.points}
        evidence["longest_run_points"] = self.off.longest
        if self.not_finite.longest:
            evidence["not_finite_points"] = self.not_finite.longest
        if self.actionable_step is not None:
            evidence["actionable_step"] = self.actionable_step
        if self.scale_fall > 1:
            evidence["loss_scale_fall"] = self.scale_fall
        return Event(
            onset_step=self.onset_step,
            peak_step=peak_step,
            end_step=self.last_off_step if ended else None,
            delta=delta,
            kind=self.kind,
            actionable=self.actionable_step is not None,
            first_signal=self.first_signal,
            lead_steps=peak_step - self.onset_step,
            evidence=evidence,
            number=self.number,
        )
