"""Recipes as tools take them: by the path of their file, and layouts as text."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from recipes.common.recipe import Layout, Recipe, RecipeError


def load_recipe(path: str) -> Recipe:
    """The `recipe` of a recipe file, by path. Raises RecipeError when there is none."""
    file = Path(path)
    if not file.is_file():
        raise RecipeError("recipe", [f"{path}: there is no such file; give the path of a recipe, like recipes/llama_1b.py"])
    spec = importlib.util.spec_from_file_location(f"recipe_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    module.__package__ = "recipes"  # its imports start at the repository root, as when it runs
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file's own code or a config's validation raises
        raise RecipeError("recipe", [f"{path} cannot be read: {type(error).__name__}: {error}"]) from error
    recipe = getattr(module, "recipe", None)
    if not isinstance(recipe, Recipe):
        raise RecipeError("recipe", [f"{path} defines no `recipe = Recipe(...)`"])
    return recipe


def parse_layout(text: str) -> tuple[Layout, int]:
    """(layout, data ranks) of "tensor=2,pipeline=2,data=2,recompute_every=1"; what is not said is 1 (and no recomputation)."""
    values: dict[str, int] = {}
    for item in text.split(","):
        name, _, value = item.partition("=")
        if name not in ("tensor", "pipeline", "data", "recompute_every") or not value.isdigit() or name in values:
            raise RecipeError(
                "--layout", [f"--layout={text!r}: {item!r} is not tensor=N, pipeline=N, data=N or recompute_every=N"]
            )
        values[name] = int(value)
    data = values.pop("data", 1)
    if data < 1 or min(values.get("tensor", 1), values.get("pipeline", 1)) < 1:
        raise RecipeError("--layout", [f"--layout={text!r}: sizes start at 1"])
    return Layout(**values), data
