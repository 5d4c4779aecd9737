"""Files in ds_configs/ are read strictly, and DeepSpeed takes what is made of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from recipes.common.config.ds_config import ds_config_path, load_ds_config, merge_ds_config
from recipes.common.recipe import ROOT, SGD, AdamW, Batch, Constant, Layout, Recipe, RecipeError, derive_sizes

NAMES = sorted(path.name for path in (ROOT / "ds_configs").glob("*.json"))
PIPELINE = Layout(tensor=2, pipeline=2)


def make_recipe(optimizer=None) -> Recipe:
    return Recipe(
        name="r",
        model=LlamaConfig(),
        num_params=1,
        tokenizer="t",
        data="d",
        layouts={8: PIPELINE},
        batch=Batch(seq_len=16, micro_seqs=2, global_seqs=24),
        optimizer=optimizer or AdamW(lr=1e-3, clip=0.5),
        schedule=Constant(warmup_steps=1),
        steps=10,
        deepspeed="zero1_bf16.json",
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("optimizer", [AdamW(lr=1e-3, clip=0.5), SGD(lr=0.1)], ids=["adamw", "sgd"])
def test_deepspeed_takes_the_merged_dict(name: str, optimizer) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    recipe = make_recipe(optimizer)
    sizes = derive_sizes(recipe, PIPELINE, 8)
    config = load_ds_config(name)
    before = copy.deepcopy(config)
    merged = merge_ds_config(config, recipe, sizes, sizes.accumulation)
    assert config == before
    assert json.loads(json.dumps(merged)) == merged
    assert (merged["train_batch_size"], merged["train_micro_batch_size_per_gpu"]) == (24, 2)
    assert merged["gradient_accumulation_steps"] == sizes.accumulation == 6
    # DeepSpeedConfig sees a world of 1 without process groups
    parsed = DeepSpeedConfig(merged | {"train_batch_size": 12})
    assert parsed.gradient_clipping == optimizer.clip
    assert parsed.grad_accum_dtype == "fp32"
    assert str(parsed.communication_data_type) == "torch.float32"
    assert not parsed.timers_config.enabled
    assert parsed.zero_config.reduce_bucket_size == 50_000_000


def test_the_ramp_gets_its_own_accumulation() -> None:
    recipe = make_recipe()
    merged = merge_ds_config({}, recipe, derive_sizes(recipe, PIPELINE, 8), accumulation=3)
    assert (merged["gradient_accumulation_steps"], merged["train_batch_size"]) == (3, 12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,}', "not plain JSON"),
        ('{"bf16": {"enabled": true, "enabled": false}}', "key given twice: ['enabled']"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ("[]", "must be a JSON object"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_ds_config(str(tmp_path / "x.json"))
    assert message in str(caught.value)
    assert str(tmp_path / "x.json") in str(caught.value)


def test_a_missing_file_has_its_nearest_name() -> None:
    with pytest.raises(RecipeError, match="did you mean 'zero1_bf16"):
        load_ds_config("zero1_bf6.json")


def test_a_file_by_path(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"bf16": {"enabled": true}}')
    assert load_ds_config(str(tmp_path / "mine.json")) == {"bf16": {"enabled": True}}
    assert load_ds_config("ds_configs/zero1_bf16.json") == load_ds_config("zero1_bf16.json")
    assert ds_config_path("zero1_bf16.json") == "ds_configs/zero1_bf16.json"
    assert ds_config_path(str(tmp_path / "mine.json")) == str(tmp_path / "mine.json")
