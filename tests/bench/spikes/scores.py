"""One number of the bench beside its goal."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """What was measured, in words a person reads in a table."""

    name: str
    value: str
    goal: str
    good: bool


def share(name: str, found: int, of: int, goal: float, detail: str = "") -> Score:
    """`found` of `of`, at least the share `goal`; nothing to find is not good."""
    text = f"{found} of {of}" + (f" ({detail})" if detail else "")
    return Score(name, text, "all" if goal == 1 else f"{goal:.0%}", of > 0 and found >= goal * of)
