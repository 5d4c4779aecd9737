"""The kinds of event that the detectors report, and the event itself. A detector that needs a new kind adds a row to `KINDS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

FAST_POINTS, DIVERGED_POINTS = 64, 128


@dataclass(frozen=True)
class Kind:
    """What the rest of the project needs to know of a kind of event."""

    name: str
    is_spike: bool = False  # the loss or the gradient norm leaves its curve at once
    cured_by_rewind: bool = False  # other sequences may avoid it


_KINDS = (
    # one step off the curve and back at the next: a hard batch, nothing to do
    Kind("outlier_batch", is_spike=True),
    # off the curve for longer, and back within FAST_POINTS logged points
    Kind("fast_recovery", is_spike=True, cured_by_rewind=True),
    # back later than that
    Kind("slow_recovery", is_spike=True, cured_by_rewind=True),
    # far off the curve for DIVERGED_POINTS logged points, or not finite for good
    Kind("diverged", is_spike=True, cured_by_rewind=True),
    # the level rises over thousands of steps
    Kind("slow_rise"),
    # no progress while the number of steps doubled
    Kind("plateau"),
    # off the curve, up or down, right after a resume
    Kind("resume_artefact", is_spike=True),
    # a new level at once and for good, while the gradient norm stays what it was
    Kind("data_regime_shift"),
    # a loss or norm that is not finite; a loss scale that falls
    Kind("precision", is_spike=True, cured_by_rewind=True),
    # steps that take longer, from one step on
    Kind("hardware_suspect"),
    # most tokens go to few of a mixture's experts
    Kind("router_collapse"),
)
KINDS = {kind.name: kind for kind in _KINDS}

# Event.evidence: how far each signal was off, and the short name under which tables show it
MEASURES = {
    "loss_z": "loss",
    "grad_norm_z": "norm",
    "loss_scale_fall": "scale /",
    "slower": "time +",
    "level_z": "level",
    "load_evenness": "evenness",
}


@dataclass(frozen=True)
class Event:
    """One thing that happened. While it lasts, `end_step` is None and the other fields hold what is known so far."""

    onset_step: int  # the first signal's first step off the curve; it names the event
    peak_step: int  # of the loss where it moved, else of the signal that did
    end_step: int | None  # the last step off the curve
    delta: float  # loss at the peak above what was expected there, in nats; negative below. Not finite where the loss was not
    kind: str  # a name in KINDS
    actionable: bool  # wake somebody, or rewind. A hard batch, a plateau, new data and slow steps are worth a line, not that
    first_signal: str  # loss, grad_norm, loss_scale, step_time, load_evenness
    lead_steps: int  # from the onset to the peak
    evidence: Mapping[str, float | str] = field(default_factory=dict)  # numbers by name: MEASURES, and further ones
    number: int = field(default=0, compare=False, repr=False)  # of its detector's events; updates of one event share it


class NewEvents:
    """What a detector has found since it last returned."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._last_number = 0

    def number(self) -> int:
        """Return the number of a new event."""
        self._last_number += 1
        return self._last_number

    def append(self, event: Event) -> None:
        self._events.append(event)

    def take(self) -> list[Event]:
        taken, self._events = self._events, []
        return taken
