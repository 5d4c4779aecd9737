"""What goes wrong in training, seen in its numbers: one code path for a run that goes on and for a log on disk.

`Watch.push` takes one step, `Watch.feed` a stretch of steps; `scan` feeds a whole log. Events do not depend on how the
steps are cut into stretches. Numbers have the names of metrics.jsonl: loss (nats), grad_norm (before clipping), lr,
loss_scale, seconds (of the step). Only loss is needed; a step may lack any of them.

Kinds of event ("class" in print):

    outlier_batch      one step off the curve and back at the next: a hard batch, nothing to do
    fast_recovery      several steps off the curve, back within FAST_POINTS points
    slow_recovery      back later than that
    diverged           not back within DIVERGED_POINTS points, or not finite for good
    slow_rise          the level rises over thousands of steps
    plateau            no progress while the number of steps doubled
    resume_artefact    a step up or down right after a resume
    data_regime_shift  a new level, up or down, at once and for good, while the gradient norm stays what it was
    precision          a loss or norm that is not finite, a loss scale that falls
    hardware_suspect   steps that take longer from one step on

`actionable`: worth waking somebody, or rewinding. A hard batch, a plateau, new data and slow steps are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

KINDS = (
    "outlier_batch",
    "fast_recovery",
    "slow_recovery",
    "diverged",
    "slow_rise",
    "plateau",
    "resume_artefact",
    "data_regime_shift",
    "precision",
    "hardware_suspect",
)


@dataclass(frozen=True)
class Event:
    """One thing that happened. While it goes on, `end_step` is None and the other fields are what is known so far."""

    onset_step: int  # the first signal's first step off the curve; it names the event
    peak_step: int  # of the loss, where it moved
    end_step: int | None  # last step of it
    delta: float  # loss at the peak above what was expected, in nats
    kind: str  # one of KINDS
    actionable: bool
    first_signal: str  # loss, grad_norm, loss_scale, seconds
    lead_steps: int  # from the onset to the peak
    evidence: Mapping[str, float | str] = field(default_factory=dict)  # robust z of each signal, when it was seen, ...


class Watch:
    """The detectors' state: bounded, some 100 kB, whatever the number of steps."""

    def push(self, step: int, values: Mapping[str, float]) -> list[Event]:
        """One step. Returns each event that opened, became actionable or ended at this step."""
        raise NotImplementedError

    def feed(self, steps: np.ndarray, columns: Mapping[str, np.ndarray]) -> list[Event]:
        """Many steps [n] at once, NaN where a step lacks a number; the same events as `push` of each."""
        raise NotImplementedError

    def resumed(self, step: int) -> None:
        """The next steps were computed by a process that started from the checkpoint of `step`."""
        raise NotImplementedError

    def finish(self) -> list[Event]:
        """The log ends here: what was still open, closed at its last step."""
        raise NotImplementedError


def scan(steps: np.ndarray, columns: Mapping[str, np.ndarray]) -> list[Event]:
    """Every event of a log, once, in order of onset. steps [n] in the order written; columns: name -> [n].

    A step number that goes back is taken for a resume from a checkpoint.
    """
    watch = Watch()
    last = {(event.onset_step, event.first_signal): event for event in [*watch.feed(steps, columns), *watch.finish()]}
    return sorted(last.values(), key=lambda event: event.onset_step)
