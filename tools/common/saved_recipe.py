"""The recipe of a run directory, read back from its recipe.json."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from transformers import CONFIG_MAPPING, PreTrainedConfig

from recipes.common import recipe as recipe_module
from recipes.common.recipe import Recipe
from tools.common.console import UsageError


def read_recipe(run: Path) -> Recipe:
    """What `recipes.common.run_files.recipe_to_dict` wrote. Fields that an older run did not know get their defaults.

    Raises UsageError where there is none, or where this version cannot read it.
    """
    path = run / "recipe.json"
    if not path.is_file():
        raise UsageError(f"{run} is no run directory: it has no recipe.json")
    try:
        return _restore(json.loads(path.read_text(encoding="utf-8")), Recipe)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is not a recipe that this version reads: {error}") from error


def _restore(value: Any, hint: Any) -> Any:
    if isinstance(value, dict) and "class" in value:
        if "model_type" in value:
            return _config(value)
        kind = getattr(recipe_module, value["class"])
        hints = get_type_hints(kind, localns={"PreTrainedConfig": PreTrainedConfig})
        known = {field.name for field in dataclasses.fields(kind)} & value.keys()
        return kind(**{name: _restore(value[name], hints[name]) for name in known})
    if isinstance(value, list):
        inner = get_args(hint)
        each = inner[0] if inner else Any
        return tuple(_restore(item, each) for item in value)
    if isinstance(value, dict) and get_origin(hint) is dict:
        key, inner = get_args(hint)
        return {key(name): _restore(item, inner) for name, item in value.items()}
    return value


def _config(value: dict[str, Any]) -> PreTrainedConfig:
    return CONFIG_MAPPING[value["model_type"]].from_dict({name: item for name, item in value.items() if name != "class"})
