"""Holds one number of a bench beside its goal."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """A measurement in words, as a row of a table."""

    name: str
    value: str
    goal: str
    good: bool


def share(name: str, found: int, of: int, goal: float, detail: str = "") -> Score:
    """Score `found` of `of`, which must be at least the share `goal`; `of` = 0 is not good."""
    text = f"{found} of {of}" + (f" ({detail})" if detail else "")
    return Score(name, text, "all" if goal == 1 else f"{goal:.0%}", of > 0 and found >= goal * of)
