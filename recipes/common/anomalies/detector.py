"""Finds what goes wrong in training by its numbers, with one code path for a live run and for a log on disk.

`AnomalyDetector.push` takes one step, `feed` a stretch of steps; `scan` feeds a whole log. The events do not depend on how the
steps are cut into stretches. Numbers have the names of metrics.jsonl: loss (nats), grad_norm (before clipping), loss_scale,
seconds (of the step). Only loss is needed. The kinds of event are in events.py; the rules in loss_spikes.py, slow_trends.py
(rises, plateaus), step_time.py, loss_scale.py and resume_level.py. Windows count logged points, not steps: a log of every fifth
step is judged like one of every step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from recipes.common.anomalies.events import KINDS, Event
from recipes.common.anomalies.loss_scale import SCALE_DEEP_FALL, SCALE_FALL, SCALE_LEAD_FALL, LossScale
from recipes.common.anomalies.loss_spikes import OpenEvent, SpikeTracker
from recipes.common.anomalies.resume_level import RESUME_POINTS, ResumeLevel
from recipes.common.anomalies.robust_window import ENOUGH, OPEN_Z, SIZE, RobustWindow
from recipes.common.anomalies.slow_trends import SlowCurve
from recipes.common.anomalies.step_time import StepTime

__all__ = ["KINDS", "AnomalyDetector", "Event", "first_moving", "scan"]

BEGINNING_STEPS = 100  # a log whose first step is later shows a run that is under way: it is judged at once
GAP_STEPS = 1024  # times the usual distance of logged steps: what came before tells nothing
HISTORY = 1024  # accepted points kept for a step back to a checkpoint
FIRST_MOVING_POINTS = 32  # before the onset of an event
COLUMNS = ("loss", "grad_norm", "loss_scale", "seconds")


class AnomalyDetector:
    """The detectors' state: some 100 kB, whatever the number of steps."""

    def __init__(self) -> None:
        self._updates: list[tuple[int, Event]] = []
        self._last_serial = 0
        self._spikes = SpikeTracker(self._emit)
        self._slow = SlowCurve(self._emit, self._serial)
        self._seconds = StepTime(self._emit, self._serial)
        self._scale = LossScale()
        self._scale_told: int | None = None  # onset step of the last fall that became an event, and its serial
        self._scale_serial = 0
        self._level: ResumeLevel | None = None
        self._resume_point: int | None = None
        self._bumped = False  # since the resume
        self._point = 0  # points seen
        self._last_steps = [0, 0]
        self._history, self._kept = np.empty((3, 2 * HISTORY)), 0  # step, loss, log norm

    def push(self, step: int, values: Mapping[str, float]) -> list[Event]:
        """One step; a step without a loss is left out. Returns each event that opened, turned worse or ended here."""
        if values.get("loss") is None:
            return []
        names = [name for name in COLUMNS if values.get(name) is not None]
        return self.feed(np.array([step]), {name: np.array([values[name]], dtype=float) for name in names})

    def feed(self, steps: np.ndarray, columns: Mapping[str, np.ndarray]) -> list[Event]:
        """Many steps [n] at once, the same events as `push` of each.

        A loss that is NaN was not finite; another number that is NaN is missing, and infinite where it was not finite.
        """
        return [event for _, event in self._feed(steps, columns)]

    def resumed(self, step: int) -> None:
        """What follows was computed from the checkpoint of `step`. Points of later steps are forgotten."""
        self._spikes.end()
        self._slow.rewind(step)
        known = self._history[:, max(self._kept - HISTORY, 0) : self._kept]
        known = known[:, known[0] <= step]
        norms = known[2][~np.isnan(known[2])]
        for window, values in ((self._spikes.loss, known[1]), (self._spikes.norm, norms)):
            window.begins_midway = True
            window.refill(values)
        self._history[:, : known.shape[1]], self._kept = known, known.shape[1]
        window = self._spikes.loss
        self._level = ResumeLevel(window.center, window.fall, window.scale) if window.count >= ENOUGH else None
        self._resume_point, self._bumped = self._point, False

    def norm_limit(self) -> float:
        """The gradient norm at which an event would open at the next step; infinite while too little is known."""
        return math.exp(self._spikes.norm.high) if self._spikes.norm.ready else math.inf

    def finish(self) -> list[Event]:
        """The log ends here: what was still open, as it ended there."""
        return [event for _, event in self._finish()]

    def _feed(self, steps: np.ndarray, columns: Mapping[str, np.ndarray]) -> list[tuple[int, Event]]:
        steps = np.asarray(steps)
        if not len(steps):
            return []
        unknown = np.full(len(steps), np.nan)
        losses, norms, scales, seconds = (np.asarray(columns.get(name, unknown), dtype=float) for name in COLUMNS)
        # math.log, not numpy's: the same bits for one value and for many
        norms = np.array([math.log(norm) if 0 < norm < math.inf else norm if norm > 0 else math.nan for norm in norms.tolist()])
        norms[(norms == math.inf) & ~np.isnan(scales)] = np.nan  # an overflow: the loss scaler skipped the step
        losses = np.where(np.isnan(losses), np.inf, losses)
        if self._point == 0:
            self._spikes.loss.begins_midway = self._spikes.norm.begins_midway = int(steps[0]) > BEGINNING_STEPS
            self._last_steps = [int(steps[0]) - 1, int(steps[0])]
        gaps = np.diff(np.concatenate([self._last_steps, steps]))
        sparse = np.minimum(gaps[:-1], gaps[1:]) > 1
        self._last_steps = [*self._last_steps, *steps[-2:].tolist()][-2:]
        leaps = gaps[1:] > GAP_STEPS * np.maximum(gaps[:-1], 1)
        starts = np.flatnonzero((gaps[1:] < 0) | leaps).tolist()
        for start, end in zip([0, *starts], [*starts, len(steps)], strict=True):
            part = slice(start, end)
            if start < end and leaps[start]:
                self._spikes.skip()
            elif start in starts:
                self.resumed(int(steps[start]) - 1)
            self._attempt(steps[part], losses[part], norms[part], scales[part], sparse[part])
            self._seconds.add(steps[part], seconds[part])
        return self._take()

    def _attempt(self, steps: np.ndarray, losses: np.ndarray, norms: np.ndarray, scales: np.ndarray, sparse: np.ndarray) -> None:
        """Points [n] of one process: healthy ones in bulk, the others one by one."""
        before = np.concatenate([[self._scale.value], scales[:-1]])
        changes = [*np.flatnonzero(~np.isnan(scales) & (scales != before)).tolist(), len(steps)]
        at = 0
        while at < len(steps):
            to_change = slice(at, changes[0] + 1)
            n = self._spikes.calm_points(losses[to_change], norms[to_change])
            part = slice(at, at + max(n, 1))
            if n:
                self._spikes.accept(losses[part], norms[part])
                self._remember(steps[part], losses[part], norms[part])
            else:
                values = int(steps[at]), float(losses[at]), float(norms[at])
                curves = self._spikes.new_levels
                self._spikes.push(*values, sparse=bool(sparse[at]), begin=self._begin)
                if self._spikes.new_levels != curves:
                    self._slow.forget()
            self._slow.add(steps[part], losses[part], self._spikes.off_points)
            self._judge_level(steps[part], losses[part])
            at, self._point = part.stop, self._point + max(n, 1)
            if at > changes[0]:
                self._judge_scale(int(steps[at - 1]), float(scales[changes.pop(0)]))

    def _begin(self, step: int, level: float) -> OpenEvent:
        """An event opens: a loss scale that was falling before is its first signal."""
        resumed = self._resume_point is not None and self._point - self._resume_point < RESUME_POINTS
        self._bumped = self._bumped or resumed
        onset, fall = self._scale.recent_fall(self._point)
        if fall < SCALE_LEAD_FALL:
            return OpenEvent(self._serial(), step, "loss", level, resumed, step, step)
        serial = self._scale_serial if self._scale_told == onset else self._serial()
        return OpenEvent(serial, onset, "loss_scale", level, resumed, step, step, scale_fall=fall)

    def _judge_scale(self, step: int, value: float) -> None:
        fall = self._scale.push(self._point, step, value)
        if self._spikes.open is not None:
            self._spikes.open.scale_fall = max(self._spikes.open.scale_fall, fall)
        elif fall >= SCALE_FALL:
            onset, _ = self._scale.recent_fall(self._point)
            if self._scale_told != onset:
                self._scale_told, self._scale_serial = onset, self._serial()
            evidence = {"loss_scale_fall": fall, "loss_scale": value}
            deep = fall >= SCALE_DEEP_FALL
            event = Event(onset, step, step, 0.0, "precision", deep, "loss_scale", step - onset, evidence)
            self._emit(self._scale_serial, event)

    def _judge_level(self, steps: np.ndarray, losses: np.ndarray) -> None:
        """The level after a resume, unless a bump that was seen already says that it is higher."""
        event = None if self._level is None else self._level.add(steps, losses)
        if event is not None and (event.delta < 0 or not self._bumped):
            self._emit(self._serial(), event)

    def _remember(self, steps: np.ndarray, losses: np.ndarray, norms: np.ndarray) -> None:
        n = len(steps)
        if self._kept + n > 2 * HISTORY:
            self._history[:, :HISTORY] = self._history[:, self._kept - HISTORY : self._kept]
            self._kept = HISTORY
        self._history[:, self._kept : self._kept + n] = steps, losses, norms
        self._kept += n

    def _finish(self) -> list[tuple[int, Event]]:
        self._spikes.end()
        self._slow.end(self._last_steps[1])
        self._seconds.end()
        return self._take()

    def _emit(self, serial: int, event: Event) -> None:
        self._updates.append((serial, event))

    def _serial(self) -> int:
        self._last_serial += 1
        return self._last_serial

    def _take(self) -> list[tuple[int, Event]]:
        taken, self._updates = self._updates, []
        return taken


def scan(steps: np.ndarray, columns: Mapping[str, np.ndarray], resumes: Sequence[int] = ()) -> list[Event]:
    """Every event of a log, once, in order of onset. steps [n] in the order written; columns as for `AnomalyDetector.feed`.

    A step number that goes back is a resume from a checkpoint: what was seen before it stays an event of the log. resumes:
    steps of checkpoints that the run went on from though its log shows no step back.
    """
    watch, updates, start = AnomalyDetector(), [], 0
    for resume in sorted(resumes):
        end = int(np.argmax(steps > resume)) if (steps > resume).any() else len(steps)
        if start <= end < len(steps):
            updates += watch._feed(steps[start:end], {name: values[start:end] for name, values in columns.items()})
            watch.resumed(resume)
            start = end
    updates += watch._feed(steps[start:], {name: values[start:] for name, values in columns.items()})
    last_words = dict([*updates, *watch._finish()])
    return sorted(last_words.values(), key=lambda event: (event.onset_step, event.first_signal))


def first_moving(
    steps: np.ndarray, norms: Mapping[str, np.ndarray], onset_step: int, peak_step: int
) -> list[tuple[str, int, float]]:
    """Which groups of parameters left their curves first: (group, step, robust z), the earliest first.

    norms: gradient norm [n] of each group at `steps` [n]. From FIRST_MOVING_POINTS points before the onset to the peak each is
    judged like the global norm, against its own SIZE points before. Groups that stay on their curves are left out.
    """
    first = max(int(np.searchsorted(steps, onset_step)) - FIRST_MOVING_POINTS, 0)
    last = int(np.searchsorted(steps, peak_step, side="right"))
    moved = []
    for group, values in norms.items():
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(np.asarray(values, dtype=float))
        window = RobustWindow(prior=0.15, floor=0.1, relative=False)
        before = logs[max(first - SIZE, 0) : first]
        window.refill(before[np.isfinite(before)])
        for at in range(first, last):
            finite = math.isfinite(logs[at])
            z = window.z(float(logs[at])) if finite else 0.0 if logs[at] == -math.inf else math.inf
            if z >= OPEN_Z:
                moved.append((group, int(steps[at]), z))
                break
            if finite:
                window.accept(logs[at : at + 1])
    return sorted(moved, key=lambda entry: (entry[1], -entry[2]))
