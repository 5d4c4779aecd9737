"""Finds what goes wrong in training by its numbers, with one code path for a live run and for a log on disk.

`AnomalyDetector.push` takes one step, `feed` a stretch of steps; `scan` feeds a whole log. The events do not depend on how the
steps are divided into stretches. Numbers have the names of metrics.jsonl: loss (nats), grad_norm (before clipping), loss_scale,
seconds (of the step). Only loss is needed. Windows count logged points, not steps: a log of every fifth step is judged like one
of every step.

A new detector is a module with a class of the protocol `Detector`, and its name in `DETECTORS`; a new kind of event is a row in
events.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from recipes.common.anomalies.curve import Curve, Points
from recipes.common.anomalies.events import Event
from recipes.common.anomalies.loss_spikes import LossSpikes
from recipes.common.anomalies.resume_level import ResumeLevel
from recipes.common.anomalies.router_collapse import RouterCollapse
from recipes.common.anomalies.slow_trends import SlowTrends
from recipes.common.anomalies.step_time import StepTime

BEGINNING_STEPS = 100  # a log whose first step is later shows a run that is under way: it is judged at once
LARGEST = 3.5e38  # beyond fp32: squares and differences of what is below are finite
GAP_STEPS = 1024  # times the usual distance of logged steps: the earlier curve predicts nothing


class Detector(Protocol):
    """Looks for some kinds of event in one run. Each method returns the events that opened, turned worse or ended in it."""

    columns: tuple[str, ...]  # of a log's columns, those that it reads

    def __init__(self, curve: Curve) -> None:
        """curve: of healthy points, kept by `LossSpikes`."""

    def add(self, points: Points) -> list[Event]:
        """Take points [n] of one process, n from 1. However a log is divided into them, the events are the same."""

    def resumed(self, step: int) -> list[Event]:
        """Called before points that were computed from the checkpoint of `step`: the points after it did not happen."""

    def finish(self) -> list[Event]:
        """The log ends: return what was still open as it ended there."""


# in the order in which they see a point: LossSpikes first, as it keeps the curve and marks points for those after it
DETECTORS: tuple[type[Detector], ...] = (LossSpikes, ResumeLevel, SlowTrends, StepTime, RouterCollapse)


class AnomalyDetector:
    """The detectors of one run: some 100 kB of state, whatever the number of steps."""

    def __init__(self, detectors: Sequence[type[Detector]] = DETECTORS) -> None:
        self._curve = Curve()
        self._detectors = [make(self._curve) for make in detectors]
        self._columns = tuple({name: None for detector in detectors for name in detector.columns})
        self.failures: list[str] = []  # of detectors that raised, which are off since: a bug in one ends no run
        self._off: set[int] = set()
        self._last_steps: list[int] = []  # two; none before the first point
        self._found: list[Event] = []

    def push(self, step: int, values: Mapping[str, float]) -> list[Event]:
        """Take one step; one without a loss is left out. Return each event that opened, turned worse or ended here."""
        if values.get("loss") is None:
            return []
        known = {name: np.array([values[name]], dtype=float) for name in self._columns if values.get(name) is not None}
        return self.feed(np.array([step]), known)

    def feed(self, steps: np.ndarray, columns: Mapping[str, np.ndarray]) -> list[Event]:
        """Take many steps [n] at once, with the same events as `push` of each.

        A loss that is NaN was not finite; another number that is NaN is missing, and infinite where it was not finite. What is
        beyond LARGEST counts as infinite, a loss scale that is none (zero, below, infinite) as missing.
        """
        steps = np.asarray(steps)
        if not len(steps):
            return []
        unknown = np.full(len(steps), np.nan)
        known = {name: _judgeable(name, np.asarray(columns.get(name, unknown), dtype=float)) for name in self._columns}
        if not self._last_steps:
            self._curve.begin(midway=int(steps[0]) > BEGINNING_STEPS)
            self._last_steps = [int(steps[0]) - 1, int(steps[0])]
        gaps = np.diff(np.concatenate([self._last_steps, steps]))
        sparse = np.minimum(gaps[:-1], gaps[1:]) > 1
        self._last_steps = [*self._last_steps, *steps[-2:].tolist()][-2:]
        back, leap = gaps[1:] < 0, gaps[1:] > GAP_STEPS * np.maximum(gaps[:-1], 1)
        starts = [0, *(start for start in np.flatnonzero(back | leap).tolist() if start)]
        for start, end in zip(starts, [*starts[1:], len(steps)], strict=True):
            if back[start]:
                self.resumed(int(steps[start]) - 1)
            part = slice(start, end)
            columns_of_part = {name: values[part] for name, values in known.items()}
            points = Points(steps[part], columns_of_part, sparse[part], after_gap=bool(leap[start]))
            self._collect(lambda detector, points=points: detector.add(points))
        return self._take()

    def resumed(self, step: int) -> None:
        """What follows was computed from the checkpoint of `step`: forget the points after it."""
        self._collect(lambda detector: detector.resumed(step))

    def norm_limit(self) -> float:
        """Return the gradient norm at which an event would open at the next step; infinite while too little is known."""
        if not self._curve.norm.ready or self._curve.norm.high > math.log(LARGEST):
            return math.inf
        return math.exp(self._curve.norm.high)

    def finish(self) -> list[Event]:
        """The log ends here: return what was still open as it ended there."""
        self._collect(lambda detector: detector.finish())
        return self._take()

    def _collect(self, ask: Callable[[Detector], list[Event]]) -> None:
        """Keep events, in the detectors' order, until the next return; their numbers become unique over all detectors."""
        count = len(self._detectors)
        for index, detector in enumerate(self._detectors):
            if index in self._off:
                continue
            try:
                events = ask(detector)
            except Exception as error:  # whatever it is: training, and the other detectors, are worth more than this one
                self._off.add(index)
                self.failures.append(f"{type(detector).__name__} failed and is off: {type(error).__name__}: {error}")
                continue
            self._found += [replace(event, number=event.number * count + index) for event in events]

    def _take(self) -> list[Event]:
        taken, self._found = self._found, []
        return taken


def _judgeable(name: str, values: np.ndarray) -> np.ndarray:
    """Return the numbers of a column as the detectors take them: finite below LARGEST, infinite, or (but for a loss) NaN."""
    values = np.where(np.abs(values) > LARGEST, np.inf, values)  # a loss of minus infinity is a loss that is not finite
    if name == "loss":
        return np.where(np.isnan(values), np.inf, values)
    return np.where((values > 0) & (values < np.inf), values, np.nan) if name == "loss_scale" else values


@dataclass(frozen=True)
class LogFindings:
    """What the detectors say of a whole log."""

    events: tuple[Event, ...]  # each once, in order of onset
    failures: tuple[str, ...]  # of detectors that raised and were off from there on


def scan(steps: np.ndarray, columns: Mapping[str, np.ndarray], resumes: Sequence[int] = ()) -> list[Event]:
    """Return the events of a log. As `judge_log`, which also says which detectors failed."""
    return list(judge_log(steps, columns, resumes).events)


def judge_log(steps: np.ndarray, columns: Mapping[str, np.ndarray], resumes: Sequence[int] = ()) -> LogFindings:
    """Return every event of a log, once, in order of onset. steps [n] in the order written; columns as for `feed`.

    A step number that goes back is a resume from a checkpoint: what was seen before it stays an event of the log. resumes:
    steps of checkpoints from which the run resumed though its log shows no step back.
    """
    detector, found, start = AnomalyDetector(), [], 0
    for resume in sorted(resumes):
        end = int(np.argmax(steps > resume)) if (steps > resume).any() else len(steps)
        if start <= end < len(steps):
            found += detector.feed(steps[start:end], {name: values[start:end] for name, values in columns.items()})
            detector.resumed(resume)
            start = end
    found += detector.feed(steps[start:], {name: values[start:] for name, values in columns.items()})
    newest = {event.number: event for event in [*found, *detector.finish()]}
    events = sorted(newest.values(), key=lambda event: (event.onset_step, event.first_signal))
    return LogFindings(tuple(events), tuple(detector.failures))
