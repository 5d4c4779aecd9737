"""A fuzz of recipe fields: any value in any field is accepted, or told with the field's name; never a traceback or a hang."""

import dataclasses
import random
import traceback
from contextlib import suppress
from functools import cache

import pytest

from recipes.common.checks import model_checks
from recipes.common.checks.dry_run import describe_run
from recipes.common.checks.recipe_checks import check_recipe
from recipes.common.config.field_types import shown
from recipes.common.recipe import (
    SGD,
    WSD,
    Batch,
    Blend,
    Constant,
    Cosine,
    InverseSqrt,
    Layout,
    Linear,
    RecipeError,
    derive_sizes,
)
from tests.support.tiny import tiny_config, tiny_recipe, write_shards
from tools.common.forked_ranks import run_ranks

VALUES = [None, float("nan"), float("inf"), -1, 0, 0.5, 10**30, 10**5000, "", "x", "~nobody/x", "a\0b", "y" * 5000, "\udc80",
          "<!--", [], [1, 2], (), (1,), {}, {1: 2}, True, object, Layout()]  # fmt: skip
MODEL_FIELDS = {
    "vocab_size": [-1, 0, True, 2**40, 10**30],
    "hidden_size": [-4, 0, 2**40],
    "num_hidden_layers": [-1, 0, True, 10**8],
    "num_attention_heads": [-1, 2**40],
    "num_key_value_heads": [-1, 0, 3, 2**40],
    "head_dim": [-1, 0, 3, 2**40],
    "intermediate_size": [-1, 0, 2**40],
    "max_position_embeddings": [-1, 0, 10**30],
    "rms_norm_eps": [float("nan"), -1.0, 1e300],
    "rope_parameters": [{"rope_type": "nowhere"}, {"rope_type": "default", "rope_theta": float("nan")}],
    "attention_dropout": [float("nan"), 2.0],
    "hidden_act": ["", "nothing"],
    "pad_token_id": [-1000, 10**6, 10**30],
}
SAMPLE = 350


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "tokens"
    write_shards(folder)
    batch = Batch(seq_len=16, micro_seqs=1, global_seqs=4, ramp=((8, 2),))
    return tiny_recipe(folder, model=tiny_config("llama", num_hidden_layers=1), num_params=47_680, batch=batch)


def _fields(holder, prefix=""):
    for field in dataclasses.fields(holder):
        value = getattr(holder, field.name)
        yield f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value) and field.name != "model":
            yield from _fields(value, f"{prefix}{field.name}.")


def _changed(recipe, path, value):
    name, _, rest = path.partition(".")
    if rest:
        value = _changed(getattr(recipe, name), rest, value)
    return dataclasses.replace(recipe, **{name: value})


def _recipes(recipe):
    """(what the message must name, the recipe) of every field of every class, with every value."""
    folder = recipe.data
    schedules = [Linear(warmup_steps=1), Cosine(warmup_tokens=64), Constant(warmup_steps=1), InverseSqrt(warmup_steps=1)]
    schedules.append(WSD(warmup_steps=1, cooldown_steps=1))
    bases = [recipe, *(dataclasses.replace(recipe, schedule=schedule) for schedule in schedules)]
    bases.append(dataclasses.replace(recipe, optimizer=SGD(lr=0.1)))
    bases.append(dataclasses.replace(recipe, data=Blend(weights={folder: 1.0}, changes=((16, {folder: 2.0}),))))
    seen = set()
    for base in bases:
        for path in _fields(base):
            holder = path.rpartition(".")[0]
            kind = type(base) if not holder else type(_at(base, holder))
            if (kind, path) in seen:
                continue
            seen.add((kind, path))
            for value in VALUES:
                yield path, value, _changed(base, path, value)
    for name, values in MODEL_FIELDS.items():
        for value in values:
            with suppress(Exception):  # refused where the recipe's file is read
                model = tiny_config("llama", **{"num_hidden_layers": 1} | {name: value})
                yield f"model.{name}", value, dataclasses.replace(recipe, model=model)
    for name in (field.name for field in dataclasses.fields(Layout)):
        for value in VALUES:
            layout = dataclasses.replace(Layout(), **{name: value})
            yield f"layouts[1].{name}", value, dataclasses.replace(recipe, layouts={1: layout})
    for value in VALUES:
        with_value = {"weights": {folder: value}}, {"weights": {folder: 1.0}, "changes": ((16, {folder: value}),)}
        yield from (("data", value, dataclasses.replace(recipe, data=Blend(**fields))) for fields in with_value)
        if isinstance(value, str | int | float | tuple):
            yield "layouts", value, dataclasses.replace(recipe, layouts={value: Layout()})
            yield "data", value, dataclasses.replace(recipe, data=Blend(weights={value: 1.0}))


def _at(holder, path):
    for name in path.split("."):
        holder = getattr(holder, name)
    return holder


def _tried(recipe, sample):
    model_checks.trial_problems = cache(model_checks.trial_problems)  # most cases have one model
    type(recipe.model).__hash__ = object.__hash__
    wrong, accepted, cases = [], [], list(_recipes(recipe))
    for path, value, changed in random.Random(0).sample(cases, sample or len(cases)):
        try:
            layout, _ = check_recipe(changed, 1, check_machine=True)
            accepted.append((path, value))
            str(describe_run(changed, layout, derive_sizes(changed, layout, 1))).encode()
        except RecipeError as error:
            leaf = path.rpartition(".")[2]
            text = str(error)
            if not any(leaf in line for line in text.splitlines()[1:]) or len(text) > 6000:
                wrong.append(f"{path}={shown(value):.60}: {text[:500]}")
        except Exception:
            wrong.append(f"{path}={shown(value):.60}: {traceback.format_exc()[-700:]}")
    return wrong, accepted


def test_any_value_of_any_field_is_accepted_or_told(recipe):
    wrong, accepted = run_ranks(_tried, 1, recipe, SAMPLE)[0]
    assert not wrong, f"{len(wrong)} cases:\n" + "\n".join(wrong)
    assert len(accepted) < SAMPLE / 4
