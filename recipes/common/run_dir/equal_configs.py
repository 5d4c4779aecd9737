"""Finds fields of two recorded recipes that differ in writing only: renamed by `transformers`, or stated beside a default."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from recipes.common import recipe as recipes
from recipes.common.config.field_effects import flat_fields

MODEL = "recipe.model."
_GROUPS = {
    "": recipes.Recipe,
    "batch": recipes.Batch,
    "evaluation": recipes.Evaluation,
    "checkpoints": recipes.Checkpoints,
    "monitor": recipes.Monitor,
    "reaction": recipes.Reaction,
}
_GONE = object()
_OF_CLASS = ("optimizer", "schedule")  # whose class a recipe chooses


@dataclasses.dataclass(frozen=True)
class FieldNames:
    """The fields of two models' configurations that are written differently."""

    equal: dict[str, str]  # field -> why it is equal in both
    renamed: dict[str, str]  # field of the second -> its name in the first; equal or not


def match_model_fields(before: Mapping[str, Any], after: Mapping[str, Any], names: Sequence[str]) -> FieldNames:
    """Return which of the differing fields of the model differ in writing only, and which have another name in the other.

    Both configurations are read by the `transformers` that is installed here, which knows the names of earlier versions and the
    names that all families share. Only asked where a field is in one of the two alone: else nothing was renamed.
    """
    differing = [name for name in names if name.startswith(MODEL)]
    if not any((name in before) != (name in after) for name in differing):
        return FieldNames({}, {})
    contents = [_nested(facts) for facts in (before, after)]
    read = [_read(content) for content in contents]
    if None in read:
        return FieldNames({}, {})
    apart = {key for key in {*read[0], *read[1]} if read[0].get(key) != read[1].get(key)}
    touched = {name: _touched(name, contents, read) for name in differing}
    renamed: dict[str, str] = {}
    for new in (name for name in differing if name not in before):
        olds = (name for name in differing if name not in after and name not in renamed.values())
        old = next((name for name in olds if touched[new] & touched[name]), None)
        if old is not None:
            renamed[new] = old
    equal = {}
    for name in differing:
        if not touched[name] & apart:
            both = (name in before and name in after) or name in renamed or name in renamed.values()
            equal[name] = "renamed, equal" if both else "stated in one, and the default of the other: equal"
    return FieldNames(equal, renamed)


def _touched(name: str, contents: Sequence[dict[str, Any]], read: Sequence[Any]) -> set[str]:
    """Return the fields, as they are read, that a written field decides: those that are others with another value of it."""
    path = name.removeprefix(MODEL).split(".")
    field = ".".join(path)
    touched = {key for whole in read for key in whole if key == field or key.startswith(f"{field}.")}
    for content, whole in zip(contents, read, strict=True):
        for other in (_with(content, path, _other_value), _with(content, path, lambda _: _GONE)):
            changed = _read(other)
            if changed is not None:
                touched |= {key for key in whole if changed.get(key) != whole[key]}
    return touched


def equal_defaults(before: Mapping[str, Any], after: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    """Return field -> why it is equal, of the fields of the recipe that one leaves out and the other has at its default."""
    equal = {}
    for name in names:
        if not name.startswith("recipe.") or name.startswith(MODEL) or (name in before) == (name in after):
            continue
        facts = before if name in before else after
        group, _, field = name.removeprefix("recipe.").rpartition(".")
        kind = getattr(recipes, str(facts.get(f"recipe.{group}.class", "")), None) if group in _OF_CLASS else _GROUPS.get(group)
        default = _defaults(kind).get(field, dataclasses.MISSING)
        if default is not dataclasses.MISSING and json.loads(json.dumps(default, default=str)) == facts[name]:
            equal[name] = "stated in one, and the default of the other: equal"
    return equal


def _defaults(kind: Any) -> dict[str, Any]:
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        return {}
    return {field.name: field.default for field in dataclasses.fields(kind)}


def _nested(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's configuration from its flat fields."""
    nested: dict[str, Any] = {}
    for name, value in facts.items():
        if name.startswith(MODEL):
            *groups, last = name.removeprefix(MODEL).split(".")
            inner = nested
            for group in groups:
                inner = inner.setdefault(group, {})
                if not isinstance(inner, dict):
                    break
            else:
                inner[last] = value
    return nested


def _with(content: Mapping[str, Any], path: Sequence[str], change: Callable[[Any], Any]) -> dict[str, Any]:
    """Return a configuration with another value at a path, or, where that is _GONE, without it."""
    copy = dict(content)
    if path[0] in copy:
        inner = copy.pop(path[0])
        value = change(inner) if len(path) == 1 else _with(inner, path[1:], change) if isinstance(inner, dict) else inner
        if value is not _GONE:
            copy[path[0]] = value
    return copy


def _other_value(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    return value * 2 + 2 if isinstance(value, int | float) else value


def _read(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the flat fields of a configuration as `transformers` reads it; None where it does not."""
    from transformers import CONFIG_MAPPING

    try:
        given = {key: value for key, value in content.items() if key not in ("class", "transformers_version")}
        config = CONFIG_MAPPING[content["model_type"]].from_dict(given)
        return flat_fields(json.loads(json.dumps(config.to_dict(), default=str)))
    except Exception:  # whatever a family's configuration raises for values of another version
        return None
