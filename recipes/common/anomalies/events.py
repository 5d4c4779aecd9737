"""What can happen to a training run, as the detectors say it.

    outlier_batch      one step off the curve and back at the next: a hard batch, nothing to do
    fast_recovery      off the curve for longer, and back within FAST_POINTS logged steps
    slow_recovery      back later than that
    diverged           far off the curve for DIVERGED_POINTS logged steps, or not finite for good
    slow_rise          the level rises over thousands of steps
    plateau            no progress while the number of steps doubled
    resume_artefact    off the curve, up or down, right after a resume
    data_regime_shift  a new level at once and for good, while the gradient norm stays what it was
    precision          a loss or norm that is not finite; a loss scale that falls
    hardware_suspect   steps that take longer, from one step on

`actionable` says: wake somebody, or rewind. A hard batch, a plateau, new data and slow steps are worth a line, not that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

SPIKES = ("outlier_batch", "fast_recovery", "slow_recovery", "diverged", "resume_artefact", "precision")

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
FAST_POINTS, DIVERGED_POINTS = 64, 128


@dataclass(frozen=True)
class Event:
    """One thing that happened. While it goes on, `end_step` is None and the other fields are what is known so far."""

    onset_step: int  # the first signal's first step off the curve; it names the event
    peak_step: int  # of the loss where it moved, else of the signal that did
    end_step: int | None  # the last step off the curve
    delta: float  # loss at the peak above what was expected there, in nats; negative below. Not finite where the loss was not
    kind: str  # one of KINDS
    actionable: bool
    first_signal: str  # loss, grad_norm, loss_scale, step_time
    lead_steps: int  # from the onset to the peak
    evidence: Mapping[str, float | str] = field(default_factory=dict)  # numbers by name: largest robust z of each signal, ...
