"""A single change of what a run is told changes the facts that it should, and no other; each fact says where it comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from recipes.common.config.ds_config import load_ds_config, merge_ds_config
from recipes.common.recipe import (
    AdamW,
    Batch,
    Blend,
    Checkpoints,
    Cosine,
    Evaluation,
    Layout,
    Monitor,
    Reaction,
    Recipe,
    derive_sizes,
)
from recipes.common.record.recipe_facts import deepspeed_facts, plan_facts, recipe_facts
from recipes.common.run_dir.segments import changed_facts
from tests.support.tiny import tiny_config, tiny_recipe

BASE = tiny_recipe(Path("data/web"))


def facts_of(recipe: Recipe, world: int = 2, **ds_keys: Any) -> tuple[dict[str, Any], dict[str, str]]:
    layout = recipe.layouts[world]
    sizes = derive_sizes(recipe, layout, world)
    ds_config = merge_ds_config(load_ds_config(recipe.deepspeed) | ds_keys, recipe, sizes, sizes.accumulation)
    told, origins = recipe_facts(recipe)
    given, from_where = deepspeed_facts(ds_config)
    return told | given | plan_facts(recipe, layout, sizes), origins | from_where


def model(**fields: Any) -> Callable[[Recipe], Recipe]:
    return lambda recipe: replace(recipe, model=tiny_config("llama", **fields))


def field(**fields: Any) -> Callable[[Recipe], Recipe]:
    return lambda recipe: replace(recipe, **fields)


CHANGES = [
    (field(seed=1), ["recipe.seed", "seed.recipe", "seed.dropout"]),
    (field(steps=9), ["recipe.steps"]),
    (field(name="other"), ["recipe.name"]),
    (field(z_loss=1e-4), ["recipe.z_loss"]),
    (field(attention="eager"), ["recipe.attention"]),
    (field(mask_documents=True), ["recipe.mask_documents"]),
    (field(logits_chunk_tokens=64), ["recipe.logits_chunk_tokens"]),
    (field(tokenizer="other/tokenizer"), ["recipe.tokenizer"]),
    (field(data="moved/web"), ["recipe.data"]),
    (field(data=Blend(weights={"data/web": 1, "data/code": 1})), ["recipe.data"]),
    (field(num_params=1), ["recipe.num_params"]),
    (field(determinism="rounding"), ["recipe.determinism", "determinism"]),
    (field(optimizer=AdamW(lr=2e-3, eps=1e-6, clip=0.5)), ["recipe.optimizer.lr"]),
    (field(optimizer=AdamW(lr=1e-3, eps=1e-8, clip=0.5)), ["recipe.optimizer.eps"]),
    (field(optimizer=AdamW(lr=1e-3, eps=1e-6, clip=0.5, betas=(0.9, 0.99))), ["recipe.optimizer.betas"]),
    (field(optimizer=AdamW(lr=1e-3, eps=1e-6, clip=0.5, weight_decay=0.0)), ["recipe.optimizer.weight_decay"]),
    (field(optimizer=AdamW(lr=1e-3, eps=1e-6)), ["recipe.optimizer.clip", "deepspeed.gradient_clipping"]),
    (field(evaluation=Evaluation(every_steps=2, seqs=8)), ["recipe.evaluation.every_steps"]),
    (field(checkpoints=Checkpoints(every_steps=4, keep_last=2)), ["recipe.checkpoints.keep_last"]),
    (field(monitor=Monitor(drift_every_steps=7)), ["recipe.monitor.drift_every_steps"]),
    (field(reaction=Reaction(action="skip")), ["recipe.reaction.action"]),
    (
        field(batch=Batch(seq_len=32, micro_seqs=1, global_seqs=4)),
        ["recipe.batch.seq_len", "sizes.tokens_per_step"],
    ),
    (
        field(batch=Batch(seq_len=16, micro_seqs=2, global_seqs=4)),
        [
            "recipe.batch.micro_seqs",
            "deepspeed.train_micro_batch_size_per_gpu",
            "deepspeed.gradient_accumulation_steps",
            "sizes.accumulation",
        ],
    ),
    (
        field(batch=Batch(seq_len=16, micro_seqs=1, global_seqs=8)),
        [
            "recipe.batch.global_seqs",
            "deepspeed.gradient_accumulation_steps",
            "deepspeed.train_batch_size",
            "sizes.accumulation",
            "sizes.tokens_per_step",
        ],
    ),
    (field(batch=Batch(seq_len=16, micro_seqs=1, global_seqs=4, ramp=((8, 2),))), ["recipe.batch.ramp"]),
    (
        field(layouts=BASE.layouts | {2: Layout(pipeline=2, recompute="full")}),
        ["recipe.layouts", "layout.recompute"],
    ),
    (
        field(layouts=BASE.layouts | {2: Layout(pipeline=2, pipeline_schedule="zero_bubble")}),
        ["recipe.layouts", "layout.pipeline_schedule"],
    ),
    (field(layouts=BASE.layouts | {2: Layout(tensor=2)}), ["recipe.layouts", "layout.tensor", "layout.pipeline"]),
    (field(layouts=BASE.layouts | {16: Layout()}), ["recipe.layouts"]),
    (model(rms_norm_eps=1e-3), ["recipe.model.rms_norm_eps"]),
    (model(hidden_act="gelu"), ["recipe.model.hidden_act"]),
    (model(tie_word_embeddings=True), ["recipe.model.tie_word_embeddings"]),
    (model(attention_dropout=0.1), ["recipe.model.attention_dropout"]),
    (model(max_position_embeddings=128), ["recipe.model.max_position_embeddings"]),
    (
        field(deepspeed="zero1_bf16.json"),
        ["recipe.deepspeed", "deepspeed.bf16.enabled", "deepspeed.bf16.immediate_grad_update"],
    ),
]


@pytest.mark.parametrize(("change", "expected"), CHANGES, ids=[expected[0] + f" {i}" for i, (_, expected) in enumerate(CHANGES)])
def test_a_single_change_of_the_recipe(change: Callable[[Recipe], Recipe], expected: list[str]) -> None:
    assert sorted(changed_facts(facts_of(BASE)[0], facts_of(change(BASE))[0])) == sorted(expected)


def test_a_field_that_is_written_out_as_its_default_is_no_change() -> None:
    same = replace(BASE, seed=1234, attention="sdpa", reaction=Reaction(), monitor=Monitor(every_steps=1))
    assert facts_of(same) == facts_of(BASE)


def test_a_key_of_the_ds_config() -> None:
    after, _ = facts_of(BASE, zero_optimization={"stage": 1, "reduce_bucket_size": 1000})
    assert "deepspeed.zero_optimization.reduce_bucket_size" in changed_facts(facts_of(BASE)[0], after)


def test_origins() -> None:
    recipe = replace(BASE, seed=1, schedule=Cosine(warmup_steps=2, min_lr=1e-5))
    _, origins = facts_of(recipe)
    assert {name: origins[f"recipe.{name}"] for name in ("seed", "z_loss", "schedule.min_lr", "schedule.decay_steps")} == {
        "seed": "recipe",
        "z_loss": "default",
        "schedule.min_lr": "recipe",
        "schedule.decay_steps": "default",
    }
    assert (origins["recipe.model.hidden_size"], origins["recipe.model.hidden_act"]) == ("recipe", "default")
    assert (origins["recipe.evaluation.seqs"], origins["recipe.evaluation.every_steps"]) == ("recipe", "recipe")
    assert (origins["deepspeed.zero_optimization.stage"], origins["deepspeed.gradient_clipping"]) == ("ds_config", "derived")


def test_deepspeeds_defaults_are_facts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A default that another release changes is seen though no file says it."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    given = {"train_batch_size": 4, "fp16": {"enabled": False}, "zero_optimization": {"stage": 1, "overlap_comm": True}}
    resolved = DeepSpeedConfig(given)
    before, origins = deepspeed_facts(given, resolved)
    assert before["deepspeed.zero_optimization.reduce_scatter"] is True
    assert origins["deepspeed.zero_optimization.reduce_scatter"] == "default"
    assert origins["deepspeed.zero_optimization.overlap_comm"] == "ds_config"
    assert before["deepspeed.fp16.loss_scale_window"] and before["deepspeed.gradient_allreduce_op"] == "mean"
    assert deepspeed_facts(given, DeepSpeedConfig(given)) == (before, origins)
    resolved.zero_config.reduce_scatter, resolved.prescale_gradients = False, True
    after, _ = deepspeed_facts(given, resolved)
    assert sorted(changed_facts(before, after)) == ["deepspeed.prescale_gradients", "deepspeed.zero_optimization.reduce_scatter"]
