"""Changes one thing of a replay: a field of the recipe or the ds_config, the sequences, the layout, the precision.

A changed recipe is typed and checked as one that is about to train; what was so before the change is not told again.
"""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_type_hints

import numpy as np
from transformers import CONFIG_MAPPING, PreTrainedConfig

from recipes.common.checkpoint.files import CheckpointError
from recipes.common.checkpoint.reorder import carry_over
from recipes.common.checks.context_checks import context_problems
from recipes.common.checks.model_checks import depth_problems, model_problems
from recipes.common.checks.recipe_checks import layout_problems, optimizer_problems, option_problems, range_problems
from recipes.common.config.ds_checks import device_problems, ds_config_problems, fp16_supported
from recipes.common.config.ds_config import did_you_mean, load_ds_config, merge_ds_config, precision
from recipes.common.config.ds_keys import RECIPE_OWNED, TOP_LEVEL
from recipes.common.config.field_effects import Effect, effect_of
from recipes.common.config.field_types import mistyped_fields, shown
from recipes.common.config.lr_schedules import global_seqs_at, schedule_problems
from recipes.common.data.batches import recipe_data_problems
from recipes.common.data.order import kept_index
from recipes.common.model.initial_weights import build_empty
from recipes.common.recipe import Layout, Recipe, RecipeError, derive_sizes, from_root
from recipes.common.run_dir.run_files import recipe_to_dict
from tools.common.console import UsageError
from tools.common.forked_ranks import run_ranks
from tools.common.recipe_io import parse_layout, restore
from tools.replay.enter import ReplayPlan, choose_device

RANKS_AT_MOST = 8  # on one machine, unless --layout asks for more
PRECISIONS = ("fp32", "bf16", "fp16")
_OF_PRECISION = ("bf16", "fp16", "data_types", "communication_data_type")
_DS = "deepspeed."  # before a key of the ds_config, where a field of the recipe could be meant
Skips = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class ReplayChange:
    """What a replay does otherwise than the run did."""

    fields: tuple[tuple[str, Any], ...] = ()  # of the recipe or the ds_config -> the other value
    without: Skips = ()  # sequences that are not read, by index
    layout: str | None = None
    precision: str | None = None

    def __str__(self) -> str:
        parts = [f"{name}={shown(value)}" for name, value in self.fields]
        parts += [f"without sequences {start}:{stop}" for start, stop in self.without]
        parts += [f"layout {self.layout}"] if self.layout else []
        return ", ".join(parts + ([self.precision] if self.precision else []))


def parse_fields(words: Sequence[str]) -> tuple[tuple[str, Any], ...]:
    """Return (field, value) of words such as "optimizer.clip=0.5": a value is JSON or a Python literal, else a text."""
    found: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name or not text:
            raise UsageError(f"--set {word}: expected FIELD=VALUE, such as optimizer.clip=0.5")
        if name in found:
            raise UsageError(f"--set {word}: {name} is given twice")
        found[name] = _value(text)
    return tuple(found.items())


def _value(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def parse_sequences(words: Sequence[str]) -> Skips:
    """Return ranges [start, stop) of words such as "40:48" or "17,40:48"; sequences are counted as --skip counts them."""
    found = []
    for item in (item for word in words for item in word.split(",")):
        start, colon, stop = item.partition(":")
        stop = stop if colon else str(int(start) + 1) if start.isdecimal() else ""
        if not (start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
            raise UsageError(f"--without {item}: expected START:STOP with START < STOP, or one number, sequences counted from 0")
        found.append((int(start), int(stop)))
    return tuple(found)


def changed_plan(plan: ReplayPlan, change: ReplayChange) -> ReplayPlan:
    """Return the plan with the change made. Raises UsageError or RecipeError with all that is wrong with it."""
    changed = _with_fields(plan, change)
    layout, world_size = changed.layout, changed.world_size
    if change.layout is not None:
        layout, world_size = _parse_layout(change.layout)
    elif world_size > RANKS_AT_MOST:
        layout, world_size = Layout(recompute=layout.recompute, recompute_every=layout.recompute_every), 1
    if change.precision is not None:
        changed = replace(changed, ds_config=_in_precision(changed.ds_config, change.precision))
    changed = replace(changed, layout=layout, world_size=world_size, device=choose_device(world_size))
    if changed == plan:
        return _without(plan, change.without)
    problems = run_ranks(_problems, 1, changed, plan)[0]  # in a rank of its own, like all tensor code
    if problems:
        raise RecipeError(f"the replay with {change}" if str(change) else "the replay", problems)
    sizes = derive_sizes(changed.recipe, layout, world_size)
    changed = replace(changed, ds_config=merge_ds_config(changed.ds_config, changed.recipe, sizes, sizes.accumulation))
    if any(effect_of(name) is Effect.ORDER for name, _ in change.fields if name.partition(".")[0] in _recipe_fields()):
        written = json.loads(json.dumps(recipe_to_dict(plan.recipe)))
        changed = replace(changed, position=carry_over(changed.position, changed.recipe, written))
    return _without(changed, change.without)


def _recipe_fields() -> set[str]:
    return {field.name for field in dataclasses.fields(Recipe)}


def _with_fields(plan: ReplayPlan, change: ReplayChange) -> ReplayPlan:
    recipe, ds_config, problems = plan.recipe, plan.ds_config, []
    for name, value in change.fields:
        top = name.partition(".")[0]
        try:
            if name in ("layouts", "deepspeed") or name.startswith("layouts."):
                recipe, ds_config = _with_file(recipe, ds_config, name, value)
            elif top in _recipe_fields() and not name.startswith(_DS):
                recipe = _with_field(recipe, name.split("."), value, name)
                if plan.checkpoint is not None and effect_of(name) is Effect.STATE:
                    problems.append(
                        f"{name}={shown(value)}: the weights and optimizer states of {plan.come_from} mean nothing then"
                    )
            else:
                ds_config = _with_key(ds_config, name.removeprefix(_DS).split("."), value, name)
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError("--set", problems)
    return replace(plan, recipe=recipe, ds_config=ds_config)


def _with_file(recipe: Recipe, ds_config: dict[str, Any], name: str, value: Any) -> tuple[Recipe, dict[str, Any]]:
    if name != "deepspeed":
        raise UsageError(f"{name}={shown(value)}: give the layout of the replay with --layout")
    if not isinstance(value, str):
        raise UsageError(f"deepspeed={shown(value)} must be a text: a file in ds_configs/, or a path")
    return replace(recipe, deepspeed=value), load_ds_config(value)


def _with_field(holder: Any, path: list[str], value: Any, name: str) -> Any:
    """Return a dataclass, a transformers config or a dict with one of its fields, at any depth, exchanged."""
    first, rest = path[0], path[1:]
    if isinstance(holder, PreTrainedConfig):
        return _with_config_field(holder, path, value, name)
    if dataclasses.is_dataclass(holder):
        known = [field.name for field in dataclasses.fields(holder)]
    elif isinstance(holder, dict):
        known = list(holder)
    else:
        raise UsageError(f"{name}: {name.rpartition('.' + '.'.join(path))[0]} is {shown(holder)}, which has no fields")
    if first not in known:
        raise UsageError(f"{name}: there is no field {first!r}{did_you_mean(first, known)}; there are {', '.join(known)}")
    old = holder[first] if isinstance(holder, dict) else getattr(holder, first)
    if rest:
        new = _with_field(old, rest, value, name)
    elif isinstance(holder, dict):
        new = value
    else:
        hints = get_type_hints(type(holder), localns={"PreTrainedConfig": PreTrainedConfig})
        new = restore(value, hints[first])
    if type(new) is type(old) and new == old:
        raise UsageError(f"{name}={shown(value)}: the run had that value, so nothing would change; give another")
    return holder | {first: new} if isinstance(holder, dict) else replace(holder, **{first: new})


def _with_config_field(config: PreTrainedConfig, path: list[str], value: Any, name: str) -> PreTrainedConfig:
    path = [type(config).attribute_map.get(path[0], path[0]), *path[1:]]
    fields = _with_field(config.to_dict(), path, value, name)
    old = config.to_dict()
    for part in path:
        old = old[part]
    like = {bool: bool, int: int | float, float: int | float, str: str, list: list | tuple}.get(type(old))
    if (
        like is not None
        and value is not None
        and not (isinstance(value, like) and isinstance(value, bool) == isinstance(old, bool))
    ):
        raise UsageError(f"{name}={shown(value)} must be like {shown(old)}, the run's value")
    try:
        made = CONFIG_MAPPING[config.model_type].from_dict(fields)
    except Exception as error:  # whatever a family's own checks raise
        raise UsageError(f"{name}={shown(value)}: {' '.join(str(error).split())[:300]}") from error
    if made.to_dict() == config.to_dict():
        raise UsageError(f"{name}={shown(value)}: {type(config).__name__} takes no other value there; change another field")
    return made


def _with_key(ds_config: dict[str, Any], path: list[str], value: Any, name: str) -> dict[str, Any]:
    if path[0] not in TOP_LEVEL:
        known = [*_recipe_fields(), *TOP_LEVEL]
        owned = RECIPE_OWNED.get(path[0])
        why = f"; {owned}" if owned else f"{did_you_mean(path[0], known)}; name one of the recipe, or a key of the ds_config"
        raise UsageError(f"{name}: there is no field {path[0]!r} of a recipe or a ds_config that a replay could change{why}")
    inner = ds_config
    for part in path[:-1]:
        inner = inner.get(part, {})
        if not isinstance(inner, dict):
            raise UsageError(f"{name}: {part} is {shown(inner)} in the ds_config, which has no fields")
    if path[-1] in inner and type(inner[path[-1]]) is type(value) and inner[path[-1]] == value:
        raise UsageError(f"{name}={shown(value)}: the run had that value, so nothing would change; give another")
    return _put(ds_config, path, value)


def _put(holder: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    return holder | {path[0]: value if len(path) == 1 else _put(holder.get(path[0], {}), path[1:], value)}


def _parse_layout(words: str) -> tuple[Layout, int]:
    try:
        layout, data = parse_layout(words)
    except RecipeError as error:
        raise UsageError(str(error)) from error
    return layout, layout.tensor * layout.pipeline * data


def _in_precision(ds_config: dict[str, Any], wanted: str) -> dict[str, Any]:
    if wanted == precision(ds_config):
        raise UsageError(f"--precision {wanted}: the run was trained in {wanted}, so nothing would change; give another")
    blocks = load_ds_config(f"zero1_{wanted}.json")
    kept = {name: value for name, value in ds_config.items() if name not in _OF_PRECISION}
    return kept | {name: blocks[name] for name in _OF_PRECISION if name in blocks}


def _problems(changed: ReplayPlan, before: ReplayPlan) -> list[str]:
    """Return what is wrong with a changed plan and was not with the run's own."""
    found = _plan_problems(changed)
    known = set(_plan_problems(before)) if found else set()
    found = [line for line in found if line not in known]
    if not found and changed.checkpoint is not None and changed.recipe.model.to_dict() != before.recipe.model.to_dict():
        shapes = [
            {name: tuple(p.shape) for name, p in build_empty(plan.recipe.model, plan.recipe.attention).named_parameters()}
            for plan in (before, changed)
        ]
        found += [
            f"{name} is {shapes[0].get(name)} in {changed.come_from}, and would be {shapes[1].get(name)}"
            for name in dict.fromkeys([*shapes[0], *shapes[1]])
            if shapes[0].get(name) != shapes[1].get(name)
        ][:5]
    return list(dict.fromkeys(found))


def _plan_problems(plan: ReplayPlan) -> list[str]:
    """Check a plan as `check_recipe` checks a recipe before it trains."""
    recipe, layout = plan.recipe, plan.layout
    mistyped = mistyped_fields(recipe)
    if mistyped:
        return [line for lines in mistyped.values() for line in lines]
    problems = range_problems(recipe) + optimizer_problems(recipe.optimizer)
    problems += option_problems(layout, recipe.batch.seq_len, "--layout: ")
    if problems:
        return problems
    problems = schedule_problems(recipe) + layout_problems(recipe, layout, plan.world_size)
    depth = recipe.model.get_text_config().num_hidden_layers
    problems += depth_problems(layout, depth)
    ds_config = {name: value for name, value in plan.ds_config.items() if name not in RECIPE_OWNED and name != "steps_per_print"}
    problems += ds_config_problems(ds_config, "deepspeed.json", layout)
    problems += device_problems(ds_config, "deepspeed.json", plan.device == "cuda" or fp16_supported())
    if not problems:
        problems += context_problems(recipe, layout) if layout.context > 1 else []
        problems += model_problems(recipe, layout)
        problems += recipe_data_problems(
            recipe.data,
            seq_len=recipe.batch.seq_len,
            vocab_size=recipe.model.get_text_config().vocab_size,
            tokenizer=from_root(recipe.tokenizer),
            needs_validation=False,
            validation_seqs=recipe.evaluation.seqs,
        )
    return problems


def consumed_after(plan: ReplayPlan) -> int:
    """Return how many sequences the plan has consumed after its last step."""
    consumed = plan.position.consumed_seqs
    for _ in range(plan.first_step, plan.last_step + 1):
        consumed += global_seqs_at(plan.recipe.batch, consumed)
    return consumed


def _without(plan: ReplayPlan, ranges: Skips) -> ReplayPlan:
    """Leave sequences out of what the steps read; those that follow move up, as after --skip."""
    if not ranges:
        return plan
    position = plan.position
    read = kept_index(np.arange(position.consumed_seqs, consumed_after(plan)), position.skips)
    for start, stop in ranges:
        if not np.any((read >= start) & (read < stop)):
            raise UsageError(
                f"--without {start}:{stop}: steps {plan.first_step} to {plan.last_step} read sequences {read[0]} to {read[-1]}, "
                "and none of those; name some of them"
            )
    try:
        here = int(read[0])
        return replace(plan, position=position.skip(tuple((max(start, here), stop) for start, stop in ranges)))
    except CheckpointError as error:
        raise UsageError(str(error)) from error
