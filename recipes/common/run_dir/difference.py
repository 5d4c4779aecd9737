"""Declares a difference of two entries of runs' records: a fact, its values, and what the change can change."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recipes.common.config.fact_effects import CHANGES_LOSS, effect_of_fact
from recipes.common.config.field_effects import Effect

ABSENT = "(not there)"


@dataclass(frozen=True)
class Difference:
    """A fact whose values are not equal; values as JSON holds them."""

    name: str
    old: Any
    new: Any
    effect: Effect
    note: str = ""  # why it has that effect, where its name alone does not say so
    follows: str = ""  # the difference that it follows from: shown, not counted

    @property
    def can_change_loss(self) -> bool:
        return self.effect in CHANGES_LOSS


def differ(
    before: Mapping[str, Any], after: Mapping[str, Any], name: str, effect: Effect | None = None, note: str = ""
) -> Difference:
    """Return the difference of a fact; effect: where the values, not only the name, say what it can change."""
    return Difference(name, before.get(name, ABSENT), after.get(name, ABSENT), effect or effect_of_fact(name), note)


def short_value(value: Any, longest: int = 60) -> str:
    """Return a value for a line of text; hashes by their first digits."""
    text = value if isinstance(value, str) else repr(value)
    text = re.sub(r"\b(?:sha256:)?([0-9a-f]{12})[0-9a-f]{20,}\b", r"\1", text)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
