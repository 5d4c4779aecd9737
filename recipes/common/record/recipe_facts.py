"""Says what a run was told: every field of the recipe and of DeepSpeed's configuration, resolved, and where each comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from recipes.common.config.ds_keys import RECIPE_OWNED
from recipes.common.config.field_effects import MODEL, flat_fields
from recipes.common.data.blend import BLEND_VERSION
from recipes.common.data.order import ORDER_VERSION
from recipes.common.model.initial_weights import INITIAL_WEIGHTS_VERSION, SEED_VERSION
from recipes.common.parallel.dropout import dropout_seed
from recipes.common.recipe import Layout, Recipe, Sizes
from recipes.common.run_dir.run_files import recipe_to_dict, to_plain
from recipes.common.run_dir.segments import content_hash

DEFAULT, RECIPE, DS_CONFIG, DERIVED = "default", "recipe", "ds_config", "derived"
# attributes of DeepSpeed's own resolved configuration -> the block or key of a ds_config that they resolve
_BLOCKS = {
    "zero_config": "zero_optimization",
    "float16_config": "fp16",
    "bfloat16_config": "bf16",
    "timers_config": "timers.throughput",
    "compile_config": "compile",
    "pipeline": "pipeline",
}
_KEYS = {"grad_accum_dtype": "data_types.grad_accum_dtype", "param_dtype": "data_types.param_dtype"}
# of those attributes: what tells the rank, repeats another, or is written back by the engine
_NOT_SETTINGS = ("global_rank", "world_size", "zero_optimization_stage", "zero_enabled", "steps_per_print", "buffer_dtype")


def recipe_facts(recipe: Recipe) -> tuple[dict[str, Any], dict[str, str]]:
    """Return "recipe.FIELD" of every field, named as recipes.common.config.field_effects names it, and the origins."""
    fields = flat_fields(recipe_to_dict(recipe))
    defaults = dict(_defaults(recipe))
    facts, origins = {}, {}
    for name, value in fields.items():
        facts[f"recipe.{name}"] = value
        origins[f"recipe.{name}"] = DEFAULT if name in defaults and defaults[name] == value else RECIPE
    return facts, origins


def deepspeed_facts(ds_config: Mapping[str, Any], resolved: object = None) -> tuple[dict[str, Any], dict[str, str]]:
    """Return "deepspeed.KEY" of what DeepSpeed was given, and of its defaults for the rest, and the origins.

    ds_config: from `merge_ds_config`. resolved: DeepSpeed's DeepSpeedConfig, made from it.
    """
    facts = {f"deepspeed.{key}": value for key, value in _flat(ds_config)}
    from_recipe = (*RECIPE_OWNED, "steps_per_print")
    origins = {name: DERIVED if name.removeprefix("deepspeed.") in from_recipe else DS_CONFIG for name in facts}
    for key, value in _resolved(resolved):
        name = f"deepspeed.{key}"
        if name not in facts and not any(given.startswith(f"{name}.") for given in facts):
            facts[name], origins[name] = value, DEFAULT
    return facts, origins


def plan_facts(recipe: Recipe, layout: Layout, sizes: Sizes) -> dict[str, Any]:
    """Return what follows from the recipe on so many ranks, and what draws from its seed."""
    facts = {f"layout.{name}": value for name, value in dataclasses.asdict(layout).items()}
    derived = ("world", "data", "accumulation", "tokens_per_step")  # the others are the layout's
    return facts | {f"sizes.{name}": getattr(sizes, name) for name in derived} | algorithm_facts(recipe)


def algorithm_facts(recipe: Recipe) -> dict[str, Any]:
    """Return what draws from the recipe's seed: the versions of the algorithms, and a state of torch's generator."""
    return {
        "seed.recipe": recipe.seed,
        "seed.dropout": _generator_state(dropout_seed(recipe.seed, 1, data_rank=0, stage=0)),
        "algorithm.order": ORDER_VERSION,
        "algorithm.blend": BLEND_VERSION,
        "algorithm.initial_weights": INITIAL_WEIGHTS_VERSION,
        "algorithm.seeds": SEED_VERSION,
        "determinism": recipe.determinism,
    }


def _generator_state(seed: int) -> str:
    """Return the hash of the state of torch's generator under a seed: what a step's dropout begins with."""
    state = torch.Generator().manual_seed(seed).get_state()
    return content_hash(state.numpy().tobytes())


def _defaults(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Yield (field, default) of the recipe, of the dataclasses in it, and of the model's config."""
    yield from flat_fields(_of_dataclass(recipe)).items()
    try:
        config = type(recipe.model)()
        yield from flat_fields(to_plain(config), MODEL).items()
    except Exception:  # a config that cannot be made without arguments has no defaults
        return


def _of_dataclass(value: Any) -> dict[str, Any]:
    """Return the defaults of a dataclass's fields as `to_plain` gives values, by the classes that `value` has."""
    defaults: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if dataclasses.is_dataclass(inner):
            defaults[field.name] = _of_dataclass(inner)
        elif field.default is not dataclasses.MISSING:
            defaults[field.name] = to_plain(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = to_plain(field.default_factory())
    return defaults


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _resolved(config: object) -> Iterator[tuple[str, Any]]:
    """Yield (key of a ds_config, value) of the plain values that DeepSpeed resolved."""
    for attribute, value in vars(config).items() if config is not None else ():
        if attribute.startswith("_") or attribute in _NOT_SETTINGS:
            continue
        name = _BLOCKS.get(attribute, _KEYS.get(attribute, attribute))
        content = value.model_dump() if hasattr(value, "model_dump") else value
        if attribute in _BLOCKS and isinstance(content, Mapping):
            yield from ((f"{name}.{key}", _plain(inner)) for key, inner in _flat(content))
        elif content is None or isinstance(content, bool | int | float | str | torch.dtype):
            yield name, _plain(content)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(getattr(value, "value", value))  # a member of an enum, a dtype
