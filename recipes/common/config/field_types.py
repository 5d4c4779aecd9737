"""Checks that every field of a recipe holds the type that its dataclass declares.

Dataclasses take anything; a text where a number belongs would surface as a traceback in another check, or in the run. So would
numbers that no computer counts to, NaN, and texts that are no name or path.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
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


REFUSED = object()  # the value of a field that was refused, in words, when the recipe's file was read
LARGEST = 2**64  # a seed has 64 bits; nothing else that is counted comes near
LONGEST = 1000  # characters
_UNPRINTED = ("Cc", "Cs", "Zl", "Zp")  # Unicode's controls, half pairs, and line and paragraph separators


def type_problems(recipe: Recipe) -> list[str]:
    """Return one line for each field, at any depth, whose value has another type or is out of any range."""
    return [line for lines in mistyped_fields(recipe).values() for line in lines]


def mistyped_fields(recipe: Recipe) -> dict[str, list[str]]:
    """Return `type_problems` by the recipe's own field they are in: the others can still be checked."""
    hints = _hints(recipe)
    found = {name: list(_value_problems(getattr(recipe, name), hint, name)) for name, hint in hints.items()}
    return {name: lines for name, lines in found.items() if lines or getattr(recipe, name) is REFUSED}


def _hints(holder: Any) -> dict[str, Any]:
    hints = get_type_hints(type(holder), localns={"PreTrainedConfig": PreTrainedConfig})
    return {field.name: hints[field.name] for field in fields(holder)}


def _value_problems(value: Any, hint: Any, name: str) -> Iterator[str]:
    if value is REFUSED:
        return
    if value is MISSING:
        yield f"{name} is missing: it must be {_in_words(hint)}"
    elif not _fits(value, hint):
        yield f"{name}={shown(value)} must be {_in_words(hint)}"
    elif wrong := _out_of_reach(value):
        yield f"{name}={shown(value)} must be {_in_words(hint)}, {wrong}"
    elif get_origin(hint) is dict:
        for key, inner in value.items():
            if wrong := _out_of_reach(key):
                yield f"{name}={shown(value)}: its key {shown(key)} must be {_in_words(get_args(hint)[0])}, {wrong}"
            yield from _value_problems(inner, get_args(hint)[1], f"{name}[{shown(key)}]")
    elif get_origin(hint) is tuple:
        for index, (inner, kind) in enumerate(zip(value, _kinds(value, hint), strict=True)):
            yield from _value_problems(inner, kind, f"{name}[{index}]")
    elif is_dataclass(value) and not isinstance(value, PreTrainedConfig):
        for field, kind in _hints(value).items():
            yield from _value_problems(getattr(value, field), kind, f"{name}.{field}")


def _out_of_reach(value: Any) -> str:
    """Say what is wrong with a number or a text whose type is right; nothing if it is good."""
    if isinstance(value, int) and abs(value) >= LARGEST:
        return "below 2**64"
    if isinstance(value, float) and not math.isfinite(value):
        return "and a finite one"
    if isinstance(value, str) and (len(value) > LONGEST or any(unicodedata.category(c) in _UNPRINTED for c in value)):
        return f"at most {LONGEST} characters of one line"
    return ""


def shown(value: Any) -> str:
    """Return a value for a message, shortened: it may be any object, of any size."""
    try:
        text = repr(value)
    except Exception:  # an object's own code, or an integer that Python refuses to write in digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 200 else f"{text[:150]}... ({len(text):,} characters)"


def _kinds(value: tuple | list, hint: Any) -> tuple:
    inner = get_args(hint)
    return inner[:1] * len(value) if inner[-1] is Ellipsis else inner


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
        kinds = _kinds(value, hint)
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
