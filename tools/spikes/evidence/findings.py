"""Holds one piece of evidence: for or against which cause, how strongly, in words a person can check."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Evidence about one cause."""

    cause: str  # a name in tools.spikes.evidence.causes.CAUSES
    weight: float  # log odds in nats: over 0 for the cause, under 0 against
    text: str


@dataclass(frozen=True)
class Unanswered:
    """A question about one cause that the run directory cannot answer."""

    cause: str
    text: str
    cure: str  # what would have to be logged, or which command answers it


Evidence = Finding | Unanswered
