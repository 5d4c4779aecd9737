"""The form in which what happened is named: words, and the evidence for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recipes.common.run_dir.difference import Difference
from tools.changed.part import Metrics
from tools.changed.side import Side


@dataclass(frozen=True)
class Incident:
    """Something known to go wrong, or to be done, that the differences or the numbers show."""

    kind: str  # its name
    text: str  # what happened, in a sentence
    evidence: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "text": self.text, "evidence": list(self.evidence)}


@dataclass(frozen=True)
class Compared:
    """All that the rules look at."""

    a: Side
    b: Side
    sides: tuple[Side, ...]  # the runs that are judged: both, or the whole of the one whose segments are compared
    differences: Sequence[Difference]
    metrics: Metrics | None
