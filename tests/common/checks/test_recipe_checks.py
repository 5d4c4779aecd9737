"""Every mistake in a recipe, ds_config, data or flags is reported before any process group: field, value, constraint, cure."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig, PreTrainedConfig

from recipes.common.checks.model_checks import config_problems
from recipes.common.checks.recipe_checks import check_recipe
from recipes.common.recipe import (
    SGD,
    WSD,
    AdamW,
    Batch,
    Blend,
    Checkpoints,
    Constant,
    Cosine,
    Evaluation,
    Layout,
    Monitor,
    Reaction,
    RecipeError,
)
from tests.support.small_runs import Called, call, call_file
from tests.support.tiny import ROOT, ds_config, tiny_config, tiny_recipe, write_shards
from tools.common.forked_ranks import run_ranks

SIX_HEADS = tiny_config("llama", hidden_size=96, num_attention_heads=6)
YARN = tiny_config("llama")
YARN.update({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}})
PIPELINE = {2: Layout(pipeline=2)}
BATCH = Batch(seq_len=16, micro_seqs=1, global_seqs=4)

# name -> (world size, fields of the recipe, what the one line says: regular expressions). "ds:" fields change the ds_config.
ONE_MISTAKE = {
    "misspelt model field": (
        1,
        {"model": LlamaConfig(**tiny_config("llama").to_diff_dict(), hiden_size=32)},
        [r"^model\.hiden_size=32: LlamaConfig has no such field \(did you mean .hidden_size.\?\); remove it or spell it right$"],
    ),
    "num_params": (
        1,
        {"num_params": 140_225},
        [r"^num_params=140_225 but the model has 140_224 parameters", "check the model's fields .* or correct num_params"],
    ),
    "no layout for the world": (
        3,
        {},
        [r"^layouts has no entry for 3 GPUs, only for \[1, 2, 4, 8\]", r"add 3: Layout\(tensor=\.\.\., pipeline=\.\.\.\)"],
    ),
    "layout does not multiply": (
        4,
        {"layouts": {4: Layout(pipeline=3)}},
        [r"^layouts\[4\]: tensor=1 x pipeline=3 = 3 does not divide 4 GPUs; change the layout or the number of GPUs$"],
    ),
    "heads not divided": (
        3,
        {"layouts": {3: Layout(tensor=3)}, "batch": replace(BATCH, global_seqs=3)},
        [r"^layout tensor=3: num_attention_heads=4 is not a multiple of tensor=3; use a tensor size that fits, or tensor=1$"],
    ),
    "kv heads not divided": (
        3,
        {
            "layouts": {3: Layout(tensor=3)},
            "batch": replace(BATCH, global_seqs=3),
            "model": SIX_HEADS,
        },
        [r"^layout tensor=3: .*k_proj has 2 key/value heads: tensor=3 must divide them or be a multiple of them"],
    ),
    "more stages than layers": (
        5,
        {"layouts": {5: Layout(pipeline=5)}},
        [r"^layout pipeline=5 exceeds the model's 4 layers; use 4 stages at most$"],
    ),
    "too few layers for two chunks a stage": (
        3,
        {"layouts": {3: Layout(pipeline=3, pipeline_schedule="zero_bubble_v")}},
        [r"^layout pipeline=3 with pipeline_schedule='zero_bubble_v' needs 2 chunks .* has 4 layers; use 2 stages"],
    ),
    "too few layers for three chunks a stage": (
        2,
        {"layouts": {2: Layout(pipeline=2, chunks=3)}},
        [r"^layout pipeline=2 with pipeline_schedule='1f1b', chunks=3 needs 3 chunks .* use 1 stages at most, or chunks=2$"],
    ),
    "chunks without a pipeline": (
        2,
        {"layouts": {2: Layout(tensor=2, chunks=2)}},
        [r"^layouts\[2\]\.chunks=2 with pipeline=1: .*leave it out$"],
    ),
    "chunks of a fold": (
        2,
        {"layouts": {2: Layout(pipeline=2, chunks=2, pipeline_schedule="zero_bubble_v")}},
        [r"^layouts\[2\]\.chunks=2 with pipeline_schedule='zero_bubble_v': .* use pipeline_schedule='zero_bubble'$"],
    ),
    "layout of zero": (1, {"layouts": {1: Layout(tensor=0)}}, [r"^layouts\[1\]\.tensor=0 must be a whole number from 1$"]),
    "no such schedule": (
        2,
        {"layouts": {2: Layout(pipeline=2, pipeline_schedule="zb-h1")}},
        [r"^layouts\[2\]\.pipeline_schedule='zb-h1' must be one of '1f1b', 'zero_bubble', 'zero_bubble_v'$"],
    ),
    "partition of another pipeline": (
        2,
        {"layouts": {2: Layout(pipeline=2, layers_per_stage=(2, 1, 1))}},
        [r"^layouts\[2\]\.layers_per_stage=\(2, 1, 1\) must have 2 whole numbers from 1, .* leave it out to have them balanced$"],
    ),
    "empty stage": (
        2,
        {"layouts": {2: Layout(pipeline=2, layers_per_stage=(4, 0))}},
        [r"^layouts\[2\]\.layers_per_stage=\(4, 0\) must have 2 whole numbers from 1, .*"],
    ),
    "stage of fewer than none": (
        2,
        {"layouts": {2: Layout(pipeline=2, layers_per_stage=(5, -1))}},
        [r"^layouts\[2\]\.layers_per_stage=\(5, -1\) must have 2 whole numbers from 1, .*"],
    ),
    "no chunks": (2, {"layouts": {2: Layout(chunks=0)}}, [r"^layouts\[2\]\.chunks=0 must be a whole number from 1$"]),
    "more sequences than can be listed": (
        1,
        {"batch": replace(BATCH, global_seqs=2**62)},
        [r"^batch\.global_seqs=4611686018427387904 must be at most 2147483647: a step lists its sequences$"],
    ),
    "partition of another model": (
        2,
        {"layouts": {2: Layout(pipeline=2, layers_per_stage=(3, 2))}},
        [r"^layout layers_per_stage=\(3, 2\) has 5 layers and the model 4; let it sum to 4$"],
    ),
    "products kept of nothing": (
        1,
        {"layouts": {1: Layout(recompute_every=2)}},
        [r"^layouts\[1\]\.recompute_every=2 with recompute='none': .* leave it out, or use recompute='selective' or 'full'$"],
    ),
    "schedule without a pipeline": (
        2,
        {"layouts": {2: Layout(tensor=2, pipeline_schedule="zero_bubble")}},
        [r"^layouts\[2\]\.pipeline_schedule='zero_bubble' with pipeline=1: .*leave it out, or use pipeline=2 or more$"],
    ),
    "sequence without tensor ranks": (
        2,
        {"layouts": {2: Layout(pipeline=2, sequence_parallel=True)}},
        [r"^layouts\[2\]\.sequence_parallel=True with tensor=1: .*leave it out, or use tensor=2 or more$"],
    ),
    "sequence not divided": (
        2,
        {"layouts": {2: Layout(tensor=2, sequence_parallel=True)}, "batch": replace(BATCH, seq_len=15)},
        [r"^layouts\[2\]\.sequence_parallel=True: seq_len=15 is not a multiple of tensor=2; change seq_len, or use"],
    ),
    "context not of the data ranks": (
        4,
        {"layouts": {4: Layout(context=3)}, "batch": replace(BATCH, seq_len=15)},
        [r"^layouts\[4\]\.context=3 does not divide 4 data ranks; use context=1 or 2$"],
    ),
    "context not of the sequence": (
        4,
        {"layouts": {4: Layout(context=4)}, "batch": replace(BATCH, seq_len=14)},
        [r"^layouts\[4\]\.context=4: seq_len=14 is not a multiple of it; change seq_len, or use context=1 or 2$"],
    ),
    "context not of the heads": (
        3,
        {"layouts": {3: Layout(context=3, context_heads=3)}, "batch": replace(BATCH, seq_len=15)},
        [r"^layout context_heads=3: a tensor rank's 4 heads \(2 of keys and values\) cannot be .*; use context_heads=1, or 0$"],
    ),
    "context of an attention that cannot": (
        2,
        {"layouts": {2: Layout(context=2)}, "attention": "paged|eager"},
        [r"^layout context=2: attention='paged\|eager' cannot be shared between context ranks; use attention='sdpa', "],
    ),
    "longer than the rotary scaling": (
        1,
        {"batch": replace(BATCH, seq_len=48), "model": YARN},
        [r"^batch\.seq_len=48 is beyond model\.rope_parameters: yarn stretches 8 positions by 4\.0; "],
    ),
    "sequence of experts": (
        2,
        {
            "layouts": {2: Layout(tensor=2, sequence_parallel=True)},
            "model": tiny_config("mixtral"),
            "num_params": 362_432,
        },
        [r"^sequence_parallel=True: model_type=mixtral: .*\['moe_tp_experts'\].*; use sequence_parallel=False$"],
    ),
    "late gradients in bf16": (
        2,
        {
            "layouts": {2: Layout(pipeline=2, pipeline_schedule="zero_bubble")},
            "ds:base": "zero1_bf16.json",
            "ds:bf16": {"enabled": True, "immediate_grad_update": False},
        },
        [r"bf16\.immediate_grad_update is not true with layout\.pipeline=2, and pipeline_schedule='zero_bubble': .*write true"],
    ),
    "batch not divided": (
        2,
        {"layouts": {2: Layout()}, "batch": replace(BATCH, global_seqs=5)},
        [r"^batch\.global_seqs=5 is not a multiple of micro_seqs=1 x 2 data ranks = 2; use a multiple of 2"],
    ),
    "ramp that does not grow": (
        1,
        {"batch": replace(BATCH, ramp=((4, 8),))},
        [r"^batch\.ramp\[0\]=\(4, 8\): a ramp grows: 8 sequences must be .* fewer than batch\.global_seqs=4"],
    ),
    "longer than the positions": (
        1,
        {"batch": replace(BATCH, seq_len=65)},
        [r"^batch\.seq_len=65 is longer than model\.max_position_embeddings=64; lower seq_len or raise"],
    ),
    "pad beyond the vocabulary": (
        1,
        {"model": tiny_config("llama", pad_token_id=200)},
        [r"^model\.pad_token_id=200 is beyond model\.vocab_size=131; write pad_token_id=None, or an id of the tokenizer$"],
    ),
    "heads that do not fit": (
        1,
        {"model": tiny_config("llama", num_key_value_heads=3)},
        [r"^model=LlamaConfig: .* model\.num_key_value_heads=3 does not divide num_attention_heads=4: use one that does$"],
    ),
    "a depth that no computer builds": (
        1,
        {"model": tiny_config("llama", num_hidden_layers=10**8)},
        [r"^model\.num_hidden_layers=100000000 must be a whole number from 1 to 4_096; write the model's own$"],
    ),
    "router loss": (
        1,
        {"model": tiny_config("mixtral", output_router_logits=True), "num_params": 362_432},
        [r"^model\.output_router_logits=True collects .*; set it to False: router="],
    ),
    "unknown attention": (1, {"attention": "sdpaa"}, [r"^model=LlamaConfig: .*\"sdpaa\"` is not supported.*eager"]),
    "not a model": (1, {"model": "llama"}, [r"^model='llama' must be a transformers config"]),
    "ZeRO 2 with a pipeline": (
        2,
        {"layouts": PIPELINE, "deepspeed": "zero2_fp32.json"},
        [r"^ds_configs/zero2_fp32\.json: zero_optimization\.stage=2 with layout\.pipeline=2: .*write 1, or set pipeline=1"],
    ),
    "ZeRO 3 with a pipeline": (
        2,
        {"layouts": PIPELINE, "deepspeed": "zero3_bf16.json"},
        [r"^ds_configs/zero3_bf16\.json: zero_optimization\.stage=3 with layout\.pipeline=2: .*write 1, or set pipeline=1"],
    ),
    "no ds_config of this name": (1, {"deepspeed": "zero1_bf15.json"}, [r"there is no .*zero1_bf15\.json.*did you mean.*bf16"]),
    "bf16 accumulation": (
        1,
        {"ds:data_types": {"grad_accum_dtype": "bf16"}, "ds:base": "zero1_bf16.json"},
        [r'data_types\.grad_accum_dtype="bf16": .*in low precision; write "fp32"$'],
    ),
    "unknown key": (
        1,
        {"ds:zero_optimisation": {}},
        [r"unknown key 'zero_optimisation' \(did you mean 'zero_optimization'\?\); delete it or spell it right$"],
    ),
    "recipe's key in the ds_config": (1, {"ds:gradient_clipping": 1.0}, [r"gradient_clipping=1\.0 does not belong here"]),
    "optimizer out of range": (
        1,
        {"optimizer": SGD(lr=1e-3, clip=-1.0)},
        [r"^optimizer\.clip=-1\.0 must lie between 0\.0 and inf$"],
    ),
    "betas out of range": (
        1,
        {"optimizer": AdamW(lr=1e-3, betas=(0.9, 1.0))},
        [r"^optimizer\.betas=\(0\.9, 1\.0\): both must lie"],
    ),
    "schedule longer than the run": (
        1,
        {"schedule": WSD(warmup_steps=5, cooldown_steps=5)},
        [r"^schedule\.warmup_steps=5 \+ cooldown_steps=5 is more than the run: the run has 8 steps; shorten them"],
    ),
    "schedule without warm-up": (1, {"schedule": Cosine()}, [r"^schedule=Cosine\(\.\.\.\) has no warmup: set warmup_steps or"]),
    "z-loss under zero": (1, {"z_loss": -1e-4}, [r"^z_loss=-0\.0001 must be 0 or more$"]),
}

# fields of wrong types: (fields, the line's beginning)
MISTYPED = [
    ({"steps": "8"}, "steps='8' must be a whole number"),
    ({"steps": None}, "steps=None must be a whole number"),
    ({"steps": 8.0}, "steps=8.0 must be a whole number"),
    ({"steps": 0}, "steps=0 must be a whole number from 1"),
    ({"num_params": None}, "num_params=None must be a whole number"),
    ({"seed": "1"}, "seed='1' must be a whole number"),
    ({"name": None}, "name=None must be a text"),
    ({"tokenizer": None}, "tokenizer=None must be a text"),
    ({"deepspeed": None}, "deepspeed=None must be a text"),
    ({"deepspeed": {}}, "deepspeed={} must be a text"),
    ({"attention": None}, "attention=None must be a text"),
    ({"z_loss": "1e-4"}, "z_loss='1e-4' must be a number"),
    ({"logits_chunk_tokens": True}, "logits_chunk_tokens=True must be a whole number"),
    ({"layouts": None}, "layouts=None must be a dict of a whole number -> Layout(...)"),
    ({"layouts": {1: 2}}, "layouts[1]=2 must be Layout(...)"),
    ({"layouts": {1: Layout(tensor="2")}}, "layouts[1].tensor='2' must be a whole number"),
    ({"batch": None}, "batch=None must be Batch(...)"),
    ({"batch": replace(BATCH, seq_len="16")}, "batch.seq_len='16' must be a whole number"),
    ({"batch": replace(BATCH, micro_seqs=None)}, "batch.micro_seqs=None must be a whole number"),
    ({"batch": replace(BATCH, global_seqs="4")}, "batch.global_seqs='4' must be a whole number"),
    ({"batch": replace(BATCH, ramp=(4, 2))}, "batch.ramp=(4, 2) must be a tuple"),
    ({"optimizer": None}, "optimizer=None must be AdamW(...) or SGD(...)"),
    ({"optimizer": AdamW(lr="1e-3")}, "optimizer.lr='1e-3' must be a number"),
    ({"optimizer": AdamW(lr=1e-3, betas=None)}, "optimizer.betas=None must be a tuple"),
    ({"optimizer": SGD(lr=1e-3, decay_embeddings=1)}, "optimizer.decay_embeddings=1 must be True or False"),
    ({"schedule": None}, "schedule=None must be Constant(...) or Linear(...)"),
    ({"schedule": "cosine"}, "schedule='cosine' must be Constant(...) or Linear(...)"),
    ({"schedule": Constant(warmup_steps="2")}, "schedule.warmup_steps='2' must be a whole number or None"),
    ({"schedule": Constant(warmup_steps=2.5)}, "schedule.warmup_steps=2.5 must be a whole number or None"),
    ({"schedule": Constant(warmup_steps=True)}, "schedule.warmup_steps=True must be a whole number or None"),
    ({"reaction": Reaction(lr_factor="1")}, "reaction.lr_factor='1' must be a number"),
    ({"schedule": Cosine(warmup_steps=2, min_lr=None)}, "schedule.min_lr=None must be a number"),
    ({"evaluation": None}, "evaluation=None must be Evaluation(...)"),
    ({"evaluation": Evaluation(seqs="8")}, "evaluation.seqs='8' must be a whole number"),
    ({"checkpoints": Checkpoints(every_minutes="30")}, "checkpoints.every_minutes='30' must be a number"),
    ({"monitor": Monitor(every_steps=-1)}, "monitor.every_steps=-1 must be a whole number from 0"),
    ({"monitor": Monitor(max_nonfinite_steps=0)}, "monitor.max_nonfinite_steps=0 must be a whole number from 1"),
    ({"monitor": Monitor(on_drift="ignore")}, "monitor.on_drift='ignore' must be 'stop' or 'log'"),
    ({"checkpoints": Checkpoints(every_minutes=-1.0)}, "checkpoints.every_minutes=-1.0 must be 0 or more"),
]


def _reports(cases):
    """On a forked rank: for each (recipe, world size, check_machine) the problems, or the traceback of a check that crashed."""
    found = []
    for recipe, world_size, check_machine in cases:
        try:
            check_recipe(recipe, world_size, check_machine=check_machine)
            found.append([])
        except RecipeError as error:
            found.append(error.problems)
        except Exception:
            found.append(traceback.format_exc())
    return found


def reports(*cases):
    return run_ranks(_reports, 1, cases)[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "tokens"
    write_shards(folder)
    return folder


def _recipe(data, fields, folder):
    plain = {name: value for name, value in fields.items() if not name.startswith("ds:")}
    changes = {name[3:]: value for name, value in fields.items() if name.startswith("ds:")}
    if changes:
        path = folder / f"ds_{len(list(folder.iterdir()))}.json"
        path.write_text(json.dumps(ds_config(changes.pop("base", "zero1_fp32.json")) | changes))
        plain["deepspeed"] = str(path)
    return tiny_recipe(data, **plain)


@pytest.fixture(scope="module")
def single(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ds_configs")
    cases = [(_recipe(data, fields, folder), world_size, True) for world_size, fields, _ in ONE_MISTAKE.values()]
    return dict(zip(ONE_MISTAKE, reports(*cases), strict=True))


def test_a_good_recipe_has_no_problems_at_any_of_its_layouts(data):
    recipe = tiny_recipe(data)
    assert reports(*((recipe, world_size, True) for world_size in recipe.layouts)) == [[]] * len(recipe.layouts)


@pytest.mark.parametrize("name", ONE_MISTAKE)
def test_a_mistake_is_reported_with_field_value_constraint_and_cure(single, name):
    lines = single[name]
    assert isinstance(lines, list), f"the check crashed:\n{lines}"
    patterns = ONE_MISTAKE[name][2]
    matching = [line for line in lines if all(re.search(pattern, line) for pattern in patterns)]
    assert len(matching) == 1, lines
    # a mistake may change the model's size or end its trial, and nothing else is reported beside it
    beside = ("num_params=", "model=LlamaConfig: a small model of it does not train a step ")
    others = [line for line in lines if line not in matching and not line.startswith(beside)]
    assert others == []


@pytest.fixture(scope="module")
def mistyped(data):
    return reports(*((tiny_recipe(data, **fields), 1, True) for fields, _ in MISTYPED))


@pytest.mark.parametrize("index", range(len(MISTYPED)), ids=[line.partition(" must")[0] for _, line in MISTYPED])
def test_a_field_of_a_wrong_type_is_one_clear_line(mistyped, index):
    lines = mistyped[index]
    assert isinstance(lines, list), f"the check crashed:\n{lines}"
    assert len(lines) == 1
    assert lines[0].startswith(MISTYPED[index][1])


OTHERS = {"num_params": 1, "z_loss": -1.0, "steps": 0, "optimizer": AdamW(lr=-1.0), "deepspeed": "zero9.json"}


def test_one_mistake_does_not_hide_another(data):
    (lines,) = reports((tiny_recipe(data, **OTHERS), 3, True))
    beginnings = (
        "z_loss=-1.0",
        "steps=0",
        "optimizer.lr=-1.0",
        "deepspeed='zero9.json':",
        "layouts has no entry for 3",
        "num_params=1",
    )
    assert sorted(line.partition(" ")[0] for line in lines) == sorted(text.partition(" ")[0] for text in beginnings)


def test_mistakes_of_a_context_are_reported_together(data):
    layout = Layout(context=3, context_heads=2, mlp_chunk_tokens=-1)
    (lines,) = reports((tiny_recipe(data, layouts={4: layout}), 4, True))
    assert [line.partition("=")[0] for line in lines] == [
        "layouts[4].mlp_chunk_tokens",
        "layouts[4].context_heads",
        "layouts[4].context",
        "layout context_heads",
    ]


def test_fields_of_wrong_types_do_not_hide_what_other_fields_have(data):
    mistyped = {"num_params": "many", "seed": None, "reaction": 1, "data": Blend(weights={"a": 1.0}, changes=((16, {"a": "2"}),))}
    (lines,) = reports((tiny_recipe(data, **OTHERS | mistyped), 3, True))
    beginnings = ["data.changes[0][1]['a']='2'", "deepspeed='zero9.json':", "layouts", "num_params='many'", "optimizer.lr=-1.0",
                  "reaction=1", "seed=None", "steps=0", "z_loss=-1.0"]  # fmt: skip
    assert sorted(line.partition(" ")[0] for line in lines) == beginnings


@pytest.mark.parametrize("batch", [replace(BATCH, seq_len=0), replace(BATCH, micro_seqs=0), replace(BATCH, global_seqs=0)])
def test_an_empty_batch_is_one_line(data, batch):
    (lines,) = reports((tiny_recipe(data, batch=batch), 1, True))
    assert len(lines) == 1 and lines[0].endswith("=0 must be a whole number from 1"), lines


def test_every_field_of_a_family_is_known():
    """Common names, renamed ones (n_embd) and those that every config has are no mistakes."""
    for family in ("llama", "gpt2", "gemma2", "mixtral", "qwen3", "olmo2", "phi3", "deepseek_v3"):
        assert config_problems(tiny_config(family)) == [], family
    assert config_problems(LlamaConfig(use_cache=False, torch_dtype="float32", name_or_path="x")) == []
    assert issubclass(LlamaConfig, PreTrainedConfig)


def test_an_unknown_field_of_a_recipe_is_refused_by_python(data):
    with pytest.raises(TypeError, match="stepz"):
        tiny_recipe(data, stepz=3)


def _damage(folder, how):
    shard = folder / "train_00000.bin"
    if how == "no folder":
        for path in folder.iterdir():
            path.rename(folder.with_name(f"{folder.name}_{path.name}"))
        folder.rmdir()
    elif how == "no shard":
        shard.unlink()
    elif how == "truncated shard":
        shard.write_bytes(shard.read_bytes()[:-2])
    elif how == "truncated dataset.json":
        (folder / "dataset.json").write_text((folder / "dataset.json").read_text()[:-20])
    elif how == "no tokenizer":
        (folder / "tokenizer" / "tokenizer.json").unlink()
    elif how == "another tokenizer":
        (folder / "tokenizer" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')


@pytest.mark.parametrize(
    ("how", "pattern"),
    [
        ("no folder", r"^data=.*dataset\.json.*"),
        ("no shard", r"^data=.*: shard train_00000\.bin is missing; run tools\.data prepare again$"),
        (
            "truncated shard",
            r"^data=.*: shard train_00000\.bin has 79998 bytes, dataset\.json says 80000; run tools\.data prepare",
        ),
        ("truncated dataset.json", r"^data=.*dataset\.json"),
        ("no tokenizer", r"^tokenizer=.*: no readable tokenizer\.json .*; use .*/tokenizer"),
        ("another tokenizer", r"^tokenizer=.* is not the one that made data=.*prepare the data again$"),
    ],
)
def test_data_that_is_missing_or_damaged(tmp_path, how, pattern):
    folder = tmp_path / "tokens"
    write_shards(folder)
    _damage(folder, how)
    recipe = tiny_recipe(folder)
    (here, elsewhere) = reports((recipe, 1, True), (recipe, 1, False))
    assert any(re.search(pattern, line) for line in here), here
    assert elsewhere == []  # a dry run may be on another machine than the data


def test_data_that_does_not_fit_the_recipe(data):
    small = tiny_recipe(data, model=tiny_config("llama", vocab_size=130), num_params=140_096)
    long = tiny_recipe(data, evaluation=Evaluation(every_steps=1, seqs=400))
    too_small, too_long = reports((small, 1, True), (long, 1, True))
    assert len(too_small) == len(too_long) == 1
    assert re.search(
        r"^model\.vocab_size=130 is smaller than the 131 ids of the tokenizer.*; raise model\.vocab_size", too_small[0]
    )
    assert re.search(r"the validation split of .* has 5000 tokens, 6401 are needed for 400 sequences; lower", too_long[0])


def test_fp16_where_the_device_has_none(data):
    recipe = tiny_recipe(data, deepspeed="zero1_fp16.json")
    here, supported, elsewhere = run_ranks(_without_fp16, 1, recipe)[0]
    assert len(here) == 1
    assert re.search(
        r"^ds_configs/zero1_fp16\.json: fp16\.enabled=true, but DeepSpeed refuses .*; use a GPU, or zero1_bf16", here[0]
    )
    assert supported == elsewhere == []


def _without_fp16(recipe):
    from deepspeed.accelerator import get_accelerator

    kind = type(get_accelerator())
    kind.is_fp16_supported = lambda self: False
    (without,) = _reports([(recipe, 1, True)])
    kind.is_fp16_supported = lambda self: True
    return without, *_reports([(recipe, 1, True), (recipe, 1, False)])


SEVEN = {
    "num_key_value_heads=2": "num_kv_heads=2",
    "max_position_embeddings=512": "max_position_embeddings=64",
    "2: Layout(pipeline=2)": "2: Layout(tensor=5)",
    "global_seqs=32": "global_seqs=33",
    "lr=4e-3": "lr=-4e-3",
    "steps=300": "steps=0",
    "zero1_fp32.json": "zero1_fp23.json",
}


def _copy_of_quickstart(folder: Path, changes: dict[str, str]) -> Path:
    text = (ROOT / "recipes" / "quickstart.py").read_text()
    text = text.replace("str(Path(__file__).resolve().parents[1])", repr(str(ROOT)))
    for old, new in changes.items():
        assert text.count(old) >= 1, old
        text = text.replace(old, new, 1)
    path = folder / "seven.py"
    path.write_text(text)
    return path


REST_OF_PLACE = {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # what a launcher sets beside


def test_a_recipe_with_seven_mistakes_is_one_message_without_a_process_group(tmp_path):
    """No launcher and no peer: a process group of two could not be made."""
    path, place = _copy_of_quickstart(tmp_path, SEVEN), {"WORLD_SIZE": "2", "RANK": "0"} | REST_OF_PLACE
    called = call_file(path, "--out-dir", tmp_path / "run", **place)
    assert (called.code, called.out) == (2, "")
    lines = called.err.splitlines()
    assert lines[0] == "error: recipe 'quickstart' on 2 GPUs:"
    assert all(line.startswith("  - ") for line in lines[1:]), called.err
    for part in (
        "model.num_kv_heads=2: LlamaConfig has no such field",
        "num_params=2_361_024 but",
        "model.max_position_embeddings=64",
        "layouts[2]: tensor=5",
        "optimizer.lr=-0.004",
        "steps=0 ",
        "zero1_fp23.json",
    ):
        assert sum(part in line for line in lines[1:]) == 1, part
    assert not (tmp_path / "run").exists()


REFUSED = {
    "vocab_size=4096": 'vocab_size="4096"',
    "num_key_value_heads=2": "num_kv_heads=2",
    "2: Layout(pipeline=2)": "2: Layout(pipelines=2)",
    "global_seqs=32": "globl_seqs=33",
    "steps=300": "stepz=0",
    "zero1_fp32.json": "zero1_fp23.json",
}


@pytest.mark.parametrize("tool", ["the recipe", "a tool"])
def test_a_file_that_python_and_transformers_refuse_is_one_message_with_its_lines(tmp_path, tool):
    """The constructors' own errors hide nothing: not each other, nor what the checks find in the rest."""
    path = _copy_of_quickstart(tmp_path, REFUSED)
    if tool == "a tool":
        called = call("verify", path)
    else:  # in a process of its own: what reports them is the hook of an interpreter that ends
        command = [sys.executable, str(path), "--out-dir", str(tmp_path / "run")]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
        called = Called(result.returncode, result.stdout, result.stderr)
    assert (called.code, called.out) == (2, "")
    lines = called.err.splitlines()
    source = path.read_text().splitlines()
    for part, where in {
        "model.vocab_size='4096': LlamaConfig refuses it: Field 'vocab_size' expected int": 'vocab_size="4096"',
        "Layout has no field 'pipelines'; did you mean 'pipeline'?": "pipelines=2",
        "Batch has no field 'globl_seqs'; did you mean 'global_seqs'?": "globl_seqs=33",
        "Recipe has no field 'stepz'; did you mean 'steps'?": "stepz=0",
        "model.num_kv_heads=2: LlamaConfig has no such field": "",
    }.items():
        (line,) = [line for line in lines if part in line]
        assert not where or where in source[int(re.search(r"seven\.py line (\d+): ", line)[1]) - 1]
    if tool == "the recipe":
        for part in ("steps=0 must be", "batch.global_seqs=33 is not", "zero1_fp23.json"):
            assert sum(part in line for line in lines[1:]) == 1, part
    assert len(lines) == 1 + (8 if tool == "the recipe" else 5) and not (tmp_path / "run").exists()


def _main(recipe, flags, world_size=1):
    """(exit code, stdout, stderr) of `main(recipe)` with these flags, as rank 0 of `world_size` started by a launcher."""
    return run_ranks(_call_main, 1, recipe, [str(flag) for flag in flags], world_size)[0]


def _call_main(recipe, flags, world_size):
    from recipes.common.train import main

    os.environ.update({"WORLD_SIZE": str(world_size)} | REST_OF_PLACE)
    sys.argv = ["recipe.py", *flags]
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(recipe)
        except SystemExit as leaving:
            code = leaving.code
    return code, out.getvalue(), err.getvalue()


def test_a_fresh_start_over_checkpoints_and_a_resume_without_one(data, tmp_path):
    recipe, out_dir = tiny_recipe(data), tmp_path / "run"
    title = "error: recipe 'tiny' on 1 GPUs:\n  - "
    nothing = f"--resume: --out-dir={out_dir} holds no checkpoint to resume from; correct --out-dir, or start without --resume\n"
    assert _main(recipe, ["--out-dir", out_dir, "--resume"]) == (2, "", title + nothing)
    for step in (3, 12):
        (out_dir / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    over = (
        f"--out-dir={out_dir} holds checkpoints of a run, the newest step_00000012; continue it with --resume, or start afresh "
        "in another --out-dir\n"
    )
    assert _main(recipe, ["--out-dir", out_dir]) == (2, "", title + over)
    code, out, err = _main(recipe, ["--out-dir", out_dir, "--dry-run"])
    assert (code, err) == (0, "")
    assert out.startswith("tiny: 140,224 parameters")


def test_one_rank_speaks_for_all(data, tmp_path):
    """Flags and recipe are reported in one error, and the other ranks leave with the same code in silence."""
    recipe = tiny_recipe(data, steps=0)
    results = run_ranks(_call_main, 2, recipe, ["--out-dir", str(tmp_path), "--resume"], 2)
    assert [result[0] for result in results] == [2, 2]
    assert [line[:8] for line in results[0][2].splitlines()[1:]] == ["  - --re", "  - step"]
    assert results[1][1:] == ("", "")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-steps", "0"], "--max-steps=0 must be at least 1"),
        (["--world-size", "8"], "--world-size is for --dry-run"),
        (["--lr", "1"], "unrecognized arguments: --lr 1"),
        (["--out-dir", ""], "--out-dir='' names no folder; give one, or leave the flag out"),
    ],
)
def test_wrong_flags(data, flags, message):
    code, out, err = _main(tiny_recipe(data), flags)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
