"""Reads recipes by the path of their file or from a run directory, and layouts from text."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import sys
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from transformers import CONFIG_MAPPING, PreTrainedConfig

from recipes.common import recipe as recipe_module
from recipes.common.checks.recipe_file import read_failing_recipe
from recipes.common.config.field_types import shown, type_problems
from recipes.common.config.json_files import JsonError, read_json
from recipes.common.config.model_sizes import size_problem
from recipes.common.recipe import Layout, Recipe, RecipeError
from tools.common.console import UsageError


def load_recipe(path: str) -> Recipe:
    """Return the `recipe` of the recipe file at `path`. Raises RecipeError when there is none, or with all its wrong types."""
    file = Path(path)
    if not file.is_file():
        raise RecipeError("recipe", [f"{path}: there is no such file; give the path of a recipe, such as recipes/llama_1b.py"])
    spec = importlib.util.spec_from_file_location(f"recipe_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    module.__package__ = "recipes"  # its imports start at the repository root, as when it runs
    try:
        sys.modules[spec.name] = module  # where a dataclass of the file looks for it
        # not by Python's cache of compiled files, which takes one edited within a second for the one before
        with contextlib.redirect_stdout(sys.stderr):  # stdout is the tool's, whatever the file prints
            exec(spec.loader.source_to_code(file.read_bytes(), str(file)), vars(module))
    except SystemExit:
        why = 'it ends the program when it is read; call main(recipe) only under `if __name__ == "__main__":`'
        raise RecipeError("recipe", [f"{path}: {why}"]) from None
    except Exception:  # whatever the file's own code or a config's validation raises
        recipe, problems = _read_failing(file)
        raise RecipeError(f"recipe file {path}", problems + type_problems(recipe)) from None
    finally:
        del sys.modules[spec.name]
    recipe = getattr(module, "recipe", None)
    if not isinstance(recipe, Recipe):
        raise RecipeError("recipe", [f"{path} defines no `recipe = Recipe(...)`"])
    if mistyped := type_problems(recipe):
        raise RecipeError(f"recipe {shown(recipe.name)}", mistyped)
    return recipe


def _read_failing(file: Path) -> tuple[Recipe, list[str]]:
    try:
        return read_failing_recipe(file)
    except (OSError, SyntaxError, ValueError) as error:  # RecipeError is a ValueError, and says more
        if isinstance(error, RecipeError):
            raise
        raise RecipeError("recipe", [f"{file} cannot be read: {type(error).__name__}: {error}"]) from error


_SWITCHES = ("sequence_parallel", "offload_activations")
_SIZES = ("tensor", "pipeline", "data", "context", "context_heads", "expert", "chunks")
_NUMBERS = (*_SIZES, "recompute_every", "mlp_chunk_tokens")
_WORDS = ("recompute", "pipeline_schedule", "experts")


def parse_layout(text: str) -> tuple[Layout, int]:
    """Return (layout, data ranks) of "tensor=2,data=2,recompute=full,pipeline_schedule=zero_bubble,layers_per_stage=5+3".

    Sizes that are left out are 1, but `data` is then what `context` and `expert` need. Raises RecipeError on an unknown name or a
    value of another form.
    """
    values: dict[str, Any] = {}
    for item in text.split(","):
        name, _, value = item.partition("=")
        counts = value.split("+")
        if name in values or not (
            (name in _WORDS and value)
            or (name in _SWITCHES and value in ("0", "1"))
            or (name in _NUMBERS and _is_count(value))
            or (name == "layers_per_stage" and all(map(_is_count, counts)))
        ):
            known = f"{'=N, '.join(_SIZES)}=N, sequence_parallel=0 or 1, recompute=NAME, "
            known += "recompute_every=N, offload_activations=0 or 1, mlp_chunk_tokens=N, experts=NAME, pipeline_schedule=NAME "
            known += "or layers_per_stage=N+N+..."
            raise RecipeError("--layout", [f"--layout={text!r}: {item!r} is not {known}, each at most once"])
        values[name] = value if name in _WORDS else int(value) if name in (*_NUMBERS, *_SWITCHES) else tuple(map(int, counts))
    data = values.pop("data", math.lcm(*(max(values.get(name, 1), 1) for name in ("context", "expert"))))
    layout = Layout(**values | {name: bool(values[name]) for name in _SWITCHES if name in values})
    if min(data, layout.tensor, layout.pipeline, layout.context, layout.expert, layout.recompute_every, layout.chunks) < 1:
        raise RecipeError("--layout", [f"--layout={text!r}: sizes start at 1"])
    for name in ("context", "expert"):
        if data % getattr(layout, name):
            why = f"{name}={getattr(layout, name)} does not divide data={data} data ranks"
            raise RecipeError("--layout", [f"--layout={text!r}: {why}"])
    return layout, data


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit()


def states_data(text: str) -> bool:
    """Say whether the text of a layout states its data ranks."""
    return any(item.partition("=")[0] == "data" for item in text.split(","))


def layout_text(layout: Layout, data: int) -> str:
    """Return a layout as `parse_layout` reads it: what is not at its default, and the data ranks."""
    words = []
    for field in dataclasses.fields(Layout):
        value = getattr(layout, field.name)
        if value != field.default:
            text = "+".join(map(str, value)) if isinstance(value, tuple) else value
            words.append(f"{field.name}={int(text) if isinstance(text, bool) else text}")
    return ",".join([*words, f"data={data}"])


def read_recipe(run: Path) -> Recipe:
    """Read the recipe that `recipes.common.run_dir.run_files.recipe_to_dict` wrote; fields unknown to an older run get defaults.

    Raises UsageError when there is none, or when this version cannot read it.
    """
    path = run / "recipe.json"
    if not path.is_file():
        raise UsageError(f"{run} is no run directory: it has no recipe.json")
    return read_recipe_file(path)


def read_recipe_file(path: Path) -> Recipe:
    """Read a file that holds a recipe as a run writes it: recipe.json, one that a resume replaced, or a checkpoint's."""
    try:
        return restore(read_json(path), Recipe)
    except JsonError as error:
        raise UsageError(str(error)) from error
    except Exception as error:  # whatever a family's own checks raise
        raise UsageError(f"{path} is not a recipe that this version can read: {' '.join(str(error).split())[:300]}") from error


def restore(value: Any, hint: Any) -> Any:
    """Return a value of a recipe, of the declared type `hint`, from what JSON holds of it."""
    if isinstance(value, dict) and "class" in value:
        if "model_type" in value:
            return _config(value)
        kind = getattr(recipe_module, value["class"])
        hints = get_type_hints(kind, localns={"PreTrainedConfig": PreTrainedConfig})
        known = {field.name for field in dataclasses.fields(kind)} & value.keys()
        return kind(**{name: restore(value[name], hints[name]) for name in known})
    if isinstance(value, list):
        inner = get_args(hint)
        each = inner[0] if inner else Any
        return tuple(restore(item, each) for item in value)
    if isinstance(value, dict) and get_origin(hint) is dict:
        key, inner = get_args(hint)
        return {key(name): restore(item, inner) for name, item in value.items()}
    return value


def _config(value: dict[str, Any]) -> PreTrainedConfig:
    if problem := size_problem(value):
        raise UsageError(problem)
    return CONFIG_MAPPING[value["model_type"]].from_dict({name: item for name, item in value.items() if name != "class"})
