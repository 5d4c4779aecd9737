"""Recipes as tools take them: by the path of their file, and layouts as text."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

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


_SWITCHES = ("keep_products", "sequence_parallel")
_NUMBERS = ("tensor", "pipeline", "data", "recompute_every", *_SWITCHES)


def parse_layout(text: str) -> tuple[Layout, int]:
    """(layout, data ranks) of "tensor=2,pipeline=2,data=2,recompute_every=1,schedule=zero_bubble,cut=5+3"; others are 1."""
    values: dict[str, Any] = {}
    for item in text.split(","):
        name, _, value = item.partition("=")
        counts = value.split("+")
        known = (
            name == "schedule" or (name in _NUMBERS and value.isdigit()) or (name == "cut" and all(n.isdigit() for n in counts))
        )
        if not known or name in values:
            raise RecipeError(
                "--layout",
                [
                    f"--layout={text!r}: {item!r} is not tensor=N, pipeline=N, data=N, recompute_every=N, keep_products=0 or 1, "
                    "sequence_parallel=0 or 1, or schedule=NAME, or cut=N+N+..."
                ],
            )
        values[name] = value if name == "schedule" else tuple(map(int, counts)) if name == "cut" else int(value)
    data = values.pop("data", 1)
    layout = Layout(**values | {name: bool(values.get(name, 0)) for name in _SWITCHES})
    if min(data, layout.tensor, layout.pipeline) < 1:
        raise RecipeError("--layout", [f"--layout={text!r}: sizes start at 1"])
    return layout, data
