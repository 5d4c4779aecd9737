"""Loss and gradient norm judged together, step by step: one event for what moves at one time.

An event opens where the loss or the log of the gradient norm leaves its curve by OPEN_Z robust deviations, or is not finite.
While it is open nothing enters the windows. It ends after CALM points within OFF_Z. One point off is a hard batch: in public
per-step logs nearly every such point is one, and the next is back on the curve. It is worth waking somebody (`actionable`) when

- the loss stays above for PERSISTS points in a row by LEAST_SHARE (FAR_SHARE where the gradient norm is known and quiet), or
- the loss is above, and the gradient norm for two points in a row (in BLOOM's spike: two steps before the peak), or
- the loss is far above in a log of every k-th step, whose next point says little about the next step, or
- the loss or the norm is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from recipes.common.anomalies.events import DIVERGED_POINTS, FAST_POINTS, Event
from recipes.common.anomalies.robust_window import ENOUGH, MAD_TO_SD, OPEN_Z, RobustWindow

OFF_Z = 4.0  # still off: half of what opens
CALM = 3  # points on the curve that end an event
PERSISTS, LEAST_SHARE = 3, 0.03  # points in a row, and share of the loss: less is nothing to act on
SPARSE_Z, SPARSE_SHARE = 10.0, 0.05  # far above: in robust deviations, and in the loss's share
NEGLIGIBLE = 0.05  # of the event's largest excess: so near is back, though a very smooth curve makes it many deviations
DEAD_POINTS = 32  # not finite in a row: it does not come back
FAR_SHARE = 0.1  # of the loss: other data raises it by less, a divergence by more
YOUNG_SHARE = 0.25  # of the loss: what a log of a few lines must show, because it does not tell how noisy it is
LOST_POINTS = 8 * DIVERGED_POINTS  # a level kept for so long is the new curve
NOISIER = 3.0  # times the spread before: the curve did not move, its noise did
LINK_POINTS = 16  # a gradient norm leads the loss by a few steps, not more
QUARTER = DIVERGED_POINTS // 4

Emit = Callable[[int, Event], None]


@dataclass
class OpenEvent:
    """What is known of the event that goes on. Runs and counts are in points."""

    serial: int
    onset_step: int
    first_signal: str
    level: float  # the loss that was expected at the onset
    after_resume: bool
    peak_step: int
    norm_peak_step: int
    sign: int = 1  # -1: the loss is too low
    points: int = 0
    off_run: int = 0
    loss_run: int = 0
    norm_run: int = 0
    longest_run: int = 0
    longest_norm_run: int = 0
    norm_known: bool = False
    dead_run: int = 0
    longest_dead_run: int = 0
    calm: int = 0
    last_off_step: int = 0
    last_norm_off: int = 0
    loss_z: float = 0.0  # largest, in the event's direction
    norm_z: float = 0.0
    excess: float = 0.0  # of the loss at its peak, in the event's direction
    actionable_step: int | None = None
    scale_fall: float = 1.0
    kind: str = "outlier_batch"
    losses: list[float] = field(default_factory=list)  # the last QUARTER finite ones
    early: float = math.nan  # median of the first QUARTER
    largest_median: float = 0.0

    def event(self, ended: bool) -> Event:
        """What to tell others. `ended` fixes the end at the last point off the curve."""
        moved = self.loss_z >= OFF_Z or self.longest_dead_run > 0
        peak_step = self.peak_step if moved else self.norm_peak_step
        delta = math.nan if self.longest_dead_run else self.sign * self.excess
        evidence = {"loss_z": round(self.sign * self.loss_z, 2), "grad_norm_z": round(self.norm_z, 2), "points": self.points}
        evidence["longest_run_points"] = self.longest_run
        if self.longest_dead_run:
            evidence["not_finite_points"] = self.longest_dead_run
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
        )


Begin = Callable[[int, float], OpenEvent]  # step, expected loss -> the event that opens there


class SpikeTracker:
    """State of the joint rule. `emit(serial, event)` gets each event when it opens, when it turns worse, and when it ends."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self.loss = RobustWindow(prior=0.02, floor=0.001, relative=True, few=3)
        # a norm has to double (exp(8 * 0.1) = 2.2): logs round it, and single healthy steps reach 1.5 times the usual
        self.norm = RobustWindow(prior=0.15, floor=0.1, relative=False)
        self.open: OpenEvent | None = None
        self.off_points = 0  # of all points so far
        self.new_levels = 0  # how often the curve became another one

    def calm_points(self, losses: np.ndarray, norms: np.ndarray) -> int:
        """How many of the next points [n] are on their curves and may be taken by `accept`. norms: logs, NaN where unknown."""
        if self.open is not None:
            return 0
        n = min(self.loss.due, len(losses))
        losses, norms = losses[:n], norms[:n]
        known = np.flatnonzero(~np.isnan(norms))
        if len(known) > self.norm.due:
            n = int(known[self.norm.due])
            losses, norms = losses[:n], norms[:n]
        off = ~((losses < self.loss.high) & (losses > self.loss.low) & (losses < math.inf))
        off |= (norms >= self.norm.high) | (norms == math.inf)
        return int(off.argmax()) if off.any() else n

    def accept(self, losses: np.ndarray, norms: np.ndarray) -> None:
        """Points [n] that `calm_points` allowed."""
        self.loss.accept(losses)
        norms = norms[~np.isnan(norms)]
        if len(norms):
            self.norm.accept(norms)

    def push(self, step: int, loss: float, norm: float, *, sparse: bool, begin: Begin) -> None:
        """One point that is off its curve, or follows one that was. norm: its log, NaN where unknown.

        sparse: the log holds every k-th step only. begin: makes the event, where one opens.
        """
        if self.open is not None and self._is_another(self.open, loss):
            self._close(self.open)
        opened = self.open is None
        if opened:
            self.open = begin(step, self.loss.center)
        event = self.open
        loss_z = self.loss.z(loss) if math.isfinite(loss) else math.inf
        norm_z = 0.0 if math.isnan(norm) else self.norm.z(norm) if norm < math.inf else math.inf
        if opened:
            event.sign = -1 if loss < self.loss.low else 1
            if loss < self.loss.high and event.sign > 0 and event.first_signal == "loss":
                event.first_signal = "grad_norm"
        elif event.sign < 0 and loss_z >= OPEN_Z:
            event.sign, event.excess, event.loss_z = 1, 0.0, 0.0
        before = event.kind, event.actionable_step
        self._count(event, step, loss, loss_z, norm_z)
        self._escalate(event, step, sparse)
        if opened or (event.kind, event.actionable_step) != before:
            self._emit(event.serial, event.event(ended=False))
        if event.calm >= CALM:
            self._close(event)
        elif event.points % QUARTER == 0:
            self._judge_long(event)

    def end(self) -> None:
        """The log, or this attempt at it, ends: the open event is judged by what was seen."""
        if self.open is not None:
            self._close(self.open)

    def skip(self) -> None:
        """The log leaves out so many steps that the curve before tells nothing."""
        self.end()
        for window in (self.loss, self.norm):
            window.begins_midway = True
            window.refill(np.empty(0))

    def _count(self, event: OpenEvent, step: int, loss: float, loss_z: float, norm_z: float) -> None:
        """Runs, peaks and whether this point is off the curve."""
        dead = loss_z == math.inf or norm_z == math.inf
        excess = event.sign * (loss - self.loss.center) if math.isfinite(loss) and self.loss.count else 0.0
        z = event.sign * loss_z
        loss_off = z == math.inf or (z >= OFF_Z and excess > NEGLIGIBLE * event.excess)
        norm_off = norm_z >= OFF_Z
        event.points += 1
        event.dead_run = event.dead_run + 1 if dead else 0
        event.longest_dead_run = max(event.longest_dead_run, event.dead_run)
        event.loss_run = event.loss_run + 1 if loss_off else 0
        event.norm_run = event.norm_run + 1 if norm_off else 0
        event.longest_norm_run = max(event.longest_norm_run, event.norm_run)
        if loss_off or norm_off:
            event.off_run, event.calm, event.last_off_step = event.off_run + 1, 0, step
            event.longest_run = max(event.longest_run, event.off_run)
            self.off_points += 1
        else:
            event.off_run, event.calm = 0, event.calm + 1
        event.norm_known = event.norm_known or self.norm.ready
        if norm_off:
            event.last_norm_off = event.points
        if norm_z < math.inf and norm_z > event.norm_z:
            event.norm_z, event.norm_peak_step = norm_z, step
        if z < math.inf and z > event.loss_z:
            event.loss_z = z
        if dead and event.longest_dead_run == 1 and event.dead_run == 1:
            event.peak_step = step
        elif excess > event.excess and not event.longest_dead_run:
            event.excess, event.peak_step = excess, step
        if math.isfinite(loss):
            event.losses.append(loss)
            del event.losses[:-QUARTER]
            if math.isnan(event.early) and len(event.losses) == QUARTER:
                event.early = median(event.losses)

    def _escalate(self, event: OpenEvent, step: int, sparse: bool) -> None:
        """Sets `actionable_step` once, and the kind as far as it shows."""
        if event.longest_dead_run:
            event.kind = "diverged" if event.longest_dead_run >= DEAD_POINTS else "precision"
        elif event.kind == "outlier_batch" and event.longest_run > 1:
            event.kind = "resume_artefact" if event.after_resume else "fast_recovery"
        elif event.kind == "fast_recovery" and event.points > FAST_POINTS:
            event.kind = "slow_recovery"
        if event.actionable_step is not None or event.sign < 0:
            return
        if self.loss.count < ENOUGH and event.excess < YOUNG_SHARE * event.level and not event.longest_dead_run:
            return
        above = event.loss_z >= OPEN_Z
        quiet = event.norm_known and event.norm_z < OFF_Z and event.excess < FAR_SHARE * event.level
        high = event.excess >= LEAST_SHARE * event.level and not quiet
        persists = above and high and event.loss_run >= PERSISTS
        together = above and event.norm_z >= OPEN_Z and event.longest_norm_run > 1
        far = sparse and event.loss_z >= SPARSE_Z and event.excess >= SPARSE_SHARE * event.level
        if event.longest_dead_run or persists or together or far:
            event.actionable_step = step
            if far and event.kind == "outlier_batch":
                event.kind = "resume_artefact" if event.after_resume else "fast_recovery"

    def _is_another(self, event: OpenEvent, loss: float) -> bool:
        """Whether a jump belongs to an event of its own: long after the onset, and over all that event's losses twice."""
        if event.points < LINK_POINTS or not event.losses or not math.isfinite(loss):
            return False
        highest = max(event.losses)
        return loss - highest > max(OPEN_Z * self.loss.scale, highest - min(event.losses))

    def _judge_long(self, event: OpenEvent) -> None:
        """Every QUARTER points of an event: does it come back, is it a new level or noise, is the run lost?"""
        if len(event.losses) < QUARTER or event.dead_run:
            return
        level = median(event.losses)
        excess = event.sign * (level - event.level)
        event.largest_median = max(event.largest_median, excess)
        spread = MAD_TO_SD * median(abs(loss - level) for loss in event.losses)
        norm_quiet = event.points - event.last_norm_off > QUARTER or event.last_norm_off == 0
        around = sum(loss < event.level for loss in event.losses) / len(event.losses)
        noisier = spread > NOISIER * self.loss.scale and 0.25 < around < 0.75
        steady = abs(level - event.early) <= max(2 * spread, 0.02 * event.level)
        near = event.sign < 0 or (steady and excess < FAR_SHARE * event.level)
        ripe = event.points % DIVERGED_POINTS == 0
        if (norm_quiet and (noisier or (ripe and near))) or (ripe and event.loss_z < OFF_Z):
            event.kind = "resume_artefact" if event.after_resume else "data_regime_shift"
            self._close(event, new_level=True)
        elif event.points >= LOST_POINTS:
            self._close(event, new_level=True)
        elif ripe and event.sign > 0 and excess >= max(event.largest_median / 2, FAR_SHARE * event.level):
            event.kind = "diverged"
            if event.actionable_step is None:
                event.actionable_step = event.last_off_step
            self._emit(event.serial, event.event(ended=False))

    def _close(self, event: OpenEvent, new_level: bool = False) -> None:
        """Its last word. `new_level`: the windows start again from the last losses; the curve before is no guide."""
        if event.kind == "diverged" and event.calm >= CALM and event.longest_dead_run < DEAD_POINTS:
            event.kind = "slow_recovery"  # it came back after all
        self._emit(event.serial, event.event(ended=True))
        self.open = None
        if new_level:
            self.norm.refill(np.empty(0))
            if event.loss_z >= OFF_Z:
                self.new_levels += 1
                self.loss.refill(np.array(event.losses))
