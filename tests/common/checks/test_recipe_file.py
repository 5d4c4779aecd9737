"""A recipe file that raises is read to its end, as far as it can be, and never trained."""

import dataclasses

import pytest

from recipes.common.checks.recipe_file import read_failing_recipe
from recipes.common.config.field_types import REFUSED, mistyped_fields
from recipes.common.recipe import Batch, Layout, RecipeError

HEAD = """
from transformers import LlamaConfig
from recipes.common.recipe import AdamW, Batch, Constant, Layout, Recipe
from recipes.common.train import main
"""
BODY = """Recipe(
    name="mine",
    model=LlamaConfig(hidden_size=64),
    tokenizer="t", data="d", layouts={1: Layout()}, optimizer=AdamW(lr=1e-3), deepspeed="zero1_fp32.json",
    batch=Batch(32, 2, globl_seqs=8),
    schedule=Constant(warmup_stepz=2),
    steps=8,
)
"""


def read(folder, text):
    path = folder / "mine.py"
    path.write_text(HEAD + text)
    return read_failing_recipe(path)


@pytest.mark.parametrize("declared", ["recipe = {}", "main({})", "recipe = {}\nmain(recipe)\n1 / 0"])
def test_what_is_right_is_kept_and_what_is_wrong_told_with_its_line(tmp_path, declared):
    recipe, problems = read(tmp_path, declared.format(BODY))
    told = [
        "mine.py line 9: Batch(...): every value needs its field's name; write seq_len=... and so on",
        "mine.py line 9: Batch has no field 'globl_seqs'; did you mean 'global_seqs'?",
        "mine.py line 10: Constant has no field 'warmup_stepz'; did you mean 'warmup_steps'?",
    ]
    assert problems[:3] == told
    assert problems[3:] == (["mine.py line 15: ZeroDivisionError: division by zero"] if "1 / 0" in declared else [])
    assert recipe.batch == Batch(seq_len=32, micro_seqs=2, global_seqs=8)
    assert recipe.layouts == {1: Layout()} and recipe.schedule.warmup_steps == 2
    assert recipe.num_params is dataclasses.MISSING
    assert mistyped_fields(recipe) == {"num_params": ["num_params is missing: it must be a whole number"]}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ('hidden_size="64"', "line 7: model.hidden_size='64': LlamaConfig refuses it: Field 'hidden_size' expected int"),
        ("num_attention_heads=0", "line 7: model: LlamaConfig refuses it: ZeroDivisionError: "),
        ("num_attention_heads=5", "line 7: model: LlamaConfig refuses it: The hidden size (4096) is not a multiple"),
        ('layer_types=["x"], hiden=1', "line 7: model: LlamaConfig refuses it: The `layer_types` entries must be in"),
    ],
)
def test_what_transformers_refuses_is_told_and_the_model_is_judged_no_further(tmp_path, fields, told):
    recipe, problems = read(tmp_path, "recipe = " + BODY.replace("hidden_size=64", fields))
    assert recipe.model is REFUSED and "model" in mistyped_fields(recipe)
    assert told in problems[0], problems
    assert any("hiden=1: LlamaConfig has no such field" in problem for problem in problems) == ("hiden" in fields)


def test_a_file_without_a_recipe(tmp_path):
    with pytest.raises(RecipeError, match=r"mine\.py line 5: NameError: name 'Recip' is not defined"):
        read(tmp_path, "recipe = Recip()")
    with pytest.raises(RecipeError, match="defines no `recipe = Recipe"):
        read(tmp_path, "")


def test_constructors_are_strict_again_afterwards(tmp_path):
    read(tmp_path, "recipe = " + BODY)
    with pytest.raises(TypeError, match="globl_seqs"):
        Batch(seq_len=1, micro_seqs=1, globl_seqs=1)
