"""Checks that every field of a recipe holds the type that its dataclass declares.

Dataclasses take anything; a text where a number belongs would surface as a traceback in another check, or in the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from transformers import PreTrainedConfig

from recipes.common.recipe import Recipe

_WORDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    PreTrainedConfig: "a transformers config, like LlamaConfig(...)",
    type(None): "None",
}


def type_problems(recipe: Recipe) -> list[str]:
    """Return one line for each field, at any depth, whose value has another type."""
    return list(_field_problems(recipe, ""))


def _field_problems(holder: Any, prefix: str) -> Iterator[str]:
    hints = get_type_hints(type(holder), localns={"PreTrainedConfig": PreTrainedConfig})
    for field in fields(holder):
        yield from _value_problems(getattr(holder, field.name), hints[field.name], f"{prefix}{field.name}")


def _value_problems(value: Any, hint: Any, name: str) -> Iterator[str]:
    if not _fits(value, hint):
        yield f"{name}={value!r} must be {_in_words(hint)}"
    elif get_origin(hint) is dict:
        for key, inner in value.items():
            yield from _value_problems(inner, get_args(hint)[1], f"{name}[{key!r}]")
    elif is_dataclass(value) and not isinstance(value, PreTrainedConfig):
        yield from _field_problems(value, f"{name}.")


def _fits(value: Any, hint: Any) -> bool:
    """Return whether `value` itself is a `hint`; the values of a dict and the fields of a dataclass are checked one by one."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (UnionType, Union):
        return any(_fits(value, option) for option in inner)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(key, inner[0]) for key in value)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return False
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return len(kinds) == len(value) and all(map(_fits, value, kinds))
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _in_words(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (UnionType, Union):
        return " or ".join(map(_in_words, inner))
    if origin is dict:
        return f"a dict of {_in_words(inner[0])} -> {_in_words(inner[1])}"
    if origin is tuple:
        if inner[-1] is Ellipsis:
            return f"a tuple (...), each in it {_in_words(inner[0])}"
        return f"a tuple ({', '.join(map(_in_words, inner))})"
    return _WORDS.get(hint) or f"{hint.__name__}(...)"
