"""Says what the gate found of one model type in one layout."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

PASSED, FAILED_GATE, REFUSED, LEFT_OUT = "passed", "failed", "refused", "left out"
UNDECIDED = "undecided"  # its gradients pass, but rounding alone moves steps of AdamW as far as it differs, and beyond any bound
EXPORTED = "yes"
_PACKAGES = ("transformers", "torch", "deepspeed")


@dataclass(frozen=True, kw_only=True)
class FamilyVerdict:
    """One model type in one layout: it trains what plain transformers trains, or not, or is refused or left out."""

    family: str
    layout: str
    outcome: str  # one of the five
    reason: str = ""  # of all but PASSED
    rows: list[dict[str, Any]] = field(default_factory=list)  # WorstDifferences
    experts: int = 0
    tied: bool = False
    export: str = ""  # EXPORTED: plain transformers loads what it was trained to, with equal logits; else why not, or not tried
    whole: float = 0.0  # the share of the layers' matrices that every tensor rank holds whole
    versions: dict[str, str] = field(default_factory=lambda: installed_versions())
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())


def failed(verdict: FamilyVerdict) -> bool:
    """Return whether the type trains or exports something else than it should."""
    return verdict.outcome == FAILED_GATE or verdict.export not in ("", EXPORTED)


def installed_versions() -> dict[str, str]:
    """Return the versions that a verdict holds for."""
    return {package: version(package) for package in _PACKAGES}
