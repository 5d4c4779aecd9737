"""Every field has a class, and one that nobody classified is not free."""

from dataclasses import fields, is_dataclass
from types import UnionType
from typing import get_args, get_type_hints

import pytest
from transformers import CONFIG_MAPPING, PreTrainedConfig

from recipes.common.config.field_effects import EFFECTS, Effect, effect_of, flat_fields
from recipes.common.recipe import Recipe
from tests.support.tiny import FAMILIES

WHOLE = ("model", "layouts", "data")  # compared by themselves


def leaves(kind, prefix=""):
    for field in fields(kind):
        hint = get_type_hints(kind, localns={"PreTrainedConfig": PreTrainedConfig})[field.name]
        options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        groups = [option for option in options if is_dataclass(option)]
        if field.name in WHOLE or not groups:
            yield f"{prefix}{field.name}"
        else:
            for group in groups:
                yield from leaves(group, f"{prefix}{field.name}.")


def test_every_field_of_a_recipe_has_a_class():
    named = {*leaves(Recipe), "data.weights", "data.changes", "optimizer.class", "schedule.class"} - {"model"}
    assert named - EFFECTS.keys() == set()
    assert {name for name in EFFECTS if "." in name} - named == set()  # none that is gone


@pytest.mark.parametrize("family", sorted({*FAMILIES, "gemma", "qwen2", "mistral", "granite", "gpt_neox", "falcon"}))
def test_every_field_of_a_config_has_a_class(family):
    assert CONFIG_MAPPING[family]().to_dict().keys() - EFFECTS.keys() == set()


def test_what_nobody_classified_needs_consent():
    assert effect_of("model.a_new_field") is effect_of("a_new_field") is effect_of("batch.new") is Effect.MATHEMATICS
    assert effect_of("model.rope_parameters.rope_theta") is Effect.MATHEMATICS
    assert effect_of("model.text_config.hidden_size") is Effect.STATE
    assert effect_of("steps") is Effect.COURSE


def test_flat_fields():
    content = {
        "class": "Recipe",
        "optimizer": {"class": "SGD", "lr": 1},
        "batch": {"class": "Batch", "ramp": []},
        "data": {"a": 1},
    }
    assert flat_fields(content) == {"optimizer.class": "SGD", "optimizer.lr": 1, "batch.ramp": [], "data": {"a": 1}}
