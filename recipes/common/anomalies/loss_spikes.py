"""Judges loss, gradient norm and loss scale together, step by step: one event for what moves at one time.

An event opens where the loss or the log of the gradient norm leaves its curve by OPEN_Z robust deviations, or is not finite; a
loss scale that fell just before is then its first signal. While it is open nothing enters the windows. Its kind:

    no event ──off──> outlier_batch ──2 points off in a row──> fast_recovery ──FAST_POINTS──> slow_recovery
                            │          (RESUME_POINTS after a resume: resume_artefact)
       any ──not finite──> precision ──DEAD_POINTS in a row──> diverged
       any ──every DIVERGED_POINTS: still FAR_SHARE and half of its height above──> diverged
       any ──every QUARTER: noise grew NOISIER; every DIVERGED_POINTS: steady and near──> data_regime_shift, ends (new level)
       any ──LOST_POINTS──> ends as it is (new level)
       any ──CALM points within OFF_Z, a resume, the log's end──> ends; diverged that came back is a slow_recovery
       any ──after LINK_POINTS, a jump over all its losses twice──> ends, and another opens

At a new level the windows start again from the last losses. One point off is a hard batch: in public per-step logs nearly every
such point is one, and the next is back on the curve. An event is worth waking somebody (`actionable`) when

- the loss stays above for PERSISTS points in a row by LEAST_SHARE (FAR_SHARE where the gradient norm is known and quiet), or
- the loss is above, and the gradient norm for two points in a row (in BLOOM's spike: two steps before the peak), or
- the loss is far above in a log of every k-th step, whose next point says little about the next step, or
- the loss or the norm is not finite.
"""

from __future__ import annotations

import math
from statistics import median

import numpy as np

from recipes.common.anomalies.curve import Curve, Points
from recipes.common.anomalies.events import DIVERGED_POINTS, FAST_POINTS, Event, NewEvents
from recipes.common.anomalies.loss_scale import SCALE_DEEP_FALL, SCALE_FALL, SCALE_LEAD_FALL, LossScale
from recipes.common.anomalies.open_event import OFF_Z, QUARTER, OpenEvent
from recipes.common.anomalies.robust_window import ENOUGH, MAD_TO_SD, OPEN_Z

CALM = 3  # points on the curve that end an event
PERSISTS, LEAST_SHARE = 3, 0.03  # points in a row, and share of the loss: less is nothing to act on
SPARSE_Z, SPARSE_SHARE = 10.0, 0.05  # far above: in robust deviations, and in the loss's share
DEAD_POINTS = 32  # not finite in a row: it does not come back
FAR_SHARE = 0.1  # of the loss: other data raises it by less, a divergence by more
YOUNG_SHARE = 0.25  # of the loss: what a log of a few lines must show, because it does not show how noisy it is
LOST_POINTS = 8 * DIVERGED_POINTS  # a level kept for so long is the new curve
NOISIER = 3.0  # times the spread before: the curve did not move, its noise did
LINK_POINTS = 16  # a gradient norm leads the loss by a few steps, not more
RESUME_POINTS = 50  # a bump later than that after a resume has another cause


class LossSpikes:
    """The joint rule's state. It keeps the curve for the detectors after it, and marks their points."""

    columns = ("loss", "grad_norm", "loss_scale")

    def __init__(self, curve: Curve) -> None:
        self._curve, self._open, self._scale = curve, None, LossScale()
        self._events = NewEvents()
        self._scale_event: tuple[int, int] | None = None  # onset step and number of the last fall that became an event
        self._point = 0  # points so far
        self._resume_point: int | None = None

    def add(self, points: Points) -> list[Event]:
        """Accept healthy points in bulk and judge the others one by one."""
        if points.after_gap:
            self._end()
            self._curve.forget()
        steps, losses, scales = points.steps, points.columns["loss"], points.columns["loss_scale"]
        norms = _log_norms(points.columns["grad_norm"], scales)
        before = np.concatenate([[self._scale.value], scales[:-1]])
        changes = [*np.flatnonzero(~np.isnan(scales) & (scales != before)).tolist(), len(steps)]
        changes.reverse()
        at = 0
        while at < len(steps):
            to_change = slice(at, changes[-1] + 1)
            n = 0 if self._open else self._curve.healthy_points(losses[to_change], norms[to_change])
            if n:
                self._curve.accept(steps[at : at + n], losses[at : at + n], norms[at : at + n])
            else:
                n = 1
                self._judge(points, at, float(losses[at]), float(norms[at]))
            at, self._point = at + n, self._point + n
            if at > changes[-1]:
                self._judge_scale(int(steps[at - 1]), float(scales[changes.pop()]))
        return self._events.take()

    def resumed(self, step: int) -> list[Event]:
        self._end()
        self._curve.rewind(step)
        self._resume_point = self._point
        return self._events.take()

    def finish(self) -> list[Event]:
        self._end()
        return self._events.take()

    def _judge(self, points: Points, at: int, loss: float, norm: float) -> None:
        """Take one point that is off its curve, or follows one that was. norm: its log, NaN where unknown."""
        step, curve = int(points.steps[at]), self._curve
        if self._open is not None and self._is_another(self._open, loss):
            self._close(self._open)
        opened = self._open is None
        if opened:
            self._open, points.opened[at] = self._begin(step), True
        event = self._open
        loss_z = curve.loss.z(loss) if math.isfinite(loss) else math.inf
        norm_z = 0.0 if math.isnan(norm) else curve.norm.z(norm) if norm < math.inf else math.inf
        if opened:
            event.sign = -1 if loss < curve.loss.low else 1
            if loss < curve.loss.high and event.sign > 0 and event.first_signal == "loss":
                event.first_signal = "grad_norm"
        elif event.sign < 0 and loss_z >= OPEN_Z:
            event.sign, event.excess, event.loss_z = 1, 0.0, 0.0
        before = event.kind, event.actionable_step
        excess = loss - curve.loss.center if math.isfinite(loss) and curve.loss.count else 0.0
        points.off_curve[at] = event.add(step, loss, excess=excess, loss_z=loss_z, norm_z=norm_z)
        event.norm_known = event.norm_known or curve.norm.ready
        self._escalate(event, step, sparse=bool(points.sparse[at]))
        if opened or (event.kind, event.actionable_step) != before:
            self._events.append(event.event(ended=False))
        if event.calm >= CALM:
            self._close(event)
        elif event.points % QUARTER == 0:
            points.new_level[at] = self._judge_long(event)

    def _begin(self, step: int) -> OpenEvent:
        """Open an event: a loss scale that was falling before is its first signal."""
        level = self._curve.loss.center
        resumed = self._resume_point is not None and self._point - self._resume_point < RESUME_POINTS
        onset, fall = self._scale.recent_fall(self._point)
        if fall < SCALE_LEAD_FALL:
            return OpenEvent(self._events.number(), step, "loss", level, resumed, peak_step=step, norm_peak_step=step)
        reported = self._scale_event is not None and self._scale_event[0] == onset
        number = self._scale_event[1] if reported else self._events.number()
        return OpenEvent(number, onset, "loss_scale", level, resumed, peak_step=step, norm_peak_step=step, scale_fall=fall)

    def _judge_scale(self, step: int, value: float) -> None:
        """Take a change of the loss scale: evidence of the event that is open, or an event of its own."""
        fall = self._scale.push(self._point, step, value)
        if self._open is not None:
            self._open.scale_fall = max(self._open.scale_fall, fall)
        elif fall >= SCALE_FALL:
            onset, _ = self._scale.recent_fall(self._point)
            if self._scale_event is None or self._scale_event[0] != onset:
                self._scale_event = onset, self._events.number()
            evidence = {"loss_scale_fall": fall, "loss_scale": value}
            deep = fall >= SCALE_DEEP_FALL
            event = Event(onset, step, step, 0.0, "precision", deep, "loss_scale", step - onset, evidence, self._scale_event[1])
            self._events.append(event)

    def _escalate(self, event: OpenEvent, step: int, *, sparse: bool) -> None:
        """Set `actionable_step` once, and the kind as far as it shows."""
        if event.not_finite.longest:
            event.kind = "diverged" if event.not_finite.longest >= DEAD_POINTS else "precision"
        elif event.kind == "outlier_batch" and event.off.longest > 1:
            event.kind = "resume_artefact" if event.after_resume else "fast_recovery"
        elif event.kind == "fast_recovery" and event.points > FAST_POINTS:
            event.kind = "slow_recovery"
        if event.actionable_step is not None or event.sign < 0:
            return
        if self._curve.loss.count < ENOUGH and event.excess < YOUNG_SHARE * event.loss_size and not event.not_finite.longest:
            return
        above = event.loss_z >= OPEN_Z
        quiet = event.norm_known and event.norm_z < OFF_Z and event.excess < FAR_SHARE * event.loss_size
        high = event.excess >= LEAST_SHARE * event.loss_size and not quiet
        persists = above and high and event.loss_off.now >= PERSISTS
        together = above and event.norm_z >= OPEN_Z and event.norm_off.longest > 1
        far = sparse and event.loss_z >= SPARSE_Z and event.excess >= SPARSE_SHARE * event.loss_size
        if event.not_finite.longest or persists or together or far:
            event.actionable_step = step
            if far and event.kind == "outlier_batch":
                event.kind = "resume_artefact" if event.after_resume else "fast_recovery"

    def _is_another(self, event: OpenEvent, loss: float) -> bool:
        """Whether a jump belongs to an event of its own: long after the onset, and over all that event's losses twice."""
        if event.points < LINK_POINTS or not event.losses or not math.isfinite(loss):
            return False
        highest = max(event.losses)
        return loss - highest > max(OPEN_Z * self._curve.loss.scale, highest - min(event.losses))

    def _judge_long(self, event: OpenEvent) -> bool:
        """Judge, every QUARTER points, an event that lasts. Return whether the loss follows another curve from here on."""
        if len(event.losses) < QUARTER or event.not_finite.now:
            return False
        level = median(event.losses)
        excess = event.sign * (level - event.level)
        event.largest_median = max(event.largest_median, excess)
        spread = MAD_TO_SD * median(abs(loss - level) for loss in event.losses)
        norm_quiet = event.points - event.last_norm_off > QUARTER or event.last_norm_off == 0
        around = sum(loss < event.level for loss in event.losses) / len(event.losses)
        noisier = spread > NOISIER * self._curve.loss.scale and 0.25 < around < 0.75
        steady = abs(level - event.early) <= max(2 * spread, 0.02 * event.loss_size)
        near = event.sign < 0 or (steady and excess < FAR_SHARE * event.loss_size)
        ripe = event.points % DIVERGED_POINTS == 0
        if (norm_quiet and (noisier or (ripe and near))) or (ripe and event.loss_z < OFF_Z):
            event.kind = "resume_artefact" if event.after_resume else "data_regime_shift"
            return self._close_at_new_level(event)
        if event.points >= LOST_POINTS:
            return self._close_at_new_level(event)
        if ripe and event.sign > 0 and excess >= max(event.largest_median / 2, FAR_SHARE * event.loss_size):
            event.kind = "diverged"
            if event.actionable_step is None:
                event.actionable_step = event.last_off_step
            self._events.append(event.event(ended=False))
        return False

    def _close(self, event: OpenEvent) -> None:
        if event.kind == "diverged" and event.calm >= CALM and event.not_finite.longest < DEAD_POINTS:
            event.kind = "slow_recovery"  # it came back after all
        self._events.append(event.event(ended=True))
        self._open = None

    def _close_at_new_level(self, event: OpenEvent) -> bool:
        """Start the windows again: the curve before is no guide. Return whether the loss's curve is another one."""
        self._close(event)
        self._curve.norm.refill(np.empty(0))
        if event.loss_z < OFF_Z:
            return False
        self._curve.loss.refill(np.array(event.losses))
        return True

    def _end(self) -> None:
        """Close the open event, judged by its points so far: the log, or this attempt, ends."""
        if self._open is not None:
            self._close(self._open)


def _log_norms(norms: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return logs, NaN where unknown. An infinite norm beside a loss scale is an overflow, whose step the loss scaler skipped."""
    # math.log, not numpy's: the same bits for one value and for many
    logs = np.array([math.log(norm) if 0 < norm < math.inf else norm if norm > 0 else math.nan for norm in norms.tolist()])
    logs[(logs == math.inf) & ~np.isnan(scales)] = np.nan
    return logs
