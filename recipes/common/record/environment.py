"""Tells the environment variables that may change what a run computes, or how fast, and those that it is asked about.

Exact names, those that `fact_effects` knows: nothing else is ever recorded, and none of them holds a secret. A variable that a
new library reads is a word more there.
"""

from __future__ import annotations

from collections.abc import Mapping

from recipes.common.config.fact_effects import ENVIRONMENT_EFFECTS


def environment_facts(environment: Mapping[str, str]) -> dict[str, str]:
    """Return "environment.NAME" -> value of the variables that are known and set."""
    return {f"environment.{name}": environment[name] for name in ENVIRONMENT_EFFECTS if name in environment}
