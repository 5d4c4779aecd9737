"""The dry run tells what is no mistake but may not be meant, and says nothing of a recipe without any of it."""

import json
from dataclasses import replace

import pytest
from transformers import AutoConfig

from recipes.common.checks.run_notes import run_notes
from recipes.common.recipe import Batch, Router
from tests.support.tiny import ds_config, tiny_config, tiny_recipe, write_shards
from tools.common.forked_ranks import run_ranks

BATCH = Batch(seq_len=48, micro_seqs=2, global_seqs=4)
MASK = r"mask_documents=True with attention='{}': a dense mask of {:,} bytes"


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notes")
    write_shards(folder / "good")
    write_shards(folder / "padded")
    manifest = json.loads((folder / "padded" / "dataset.json").read_text())
    manifest |= {"counts": {"padding_tokens": 450}, "packed_for": 16}
    (folder / "padded" / "dataset.json").write_text(json.dumps(manifest))
    (folder / "bf16.json").write_text(json.dumps(ds_config("zero1_bf16.json")))
    good = tiny_recipe(folder / "good")
    masked = replace(good, mask_documents=True, batch=BATCH)
    indexed = AutoConfig.for_model("deepseek_v32")
    recipes = {
        "good": good,
        "pad is the end": replace(good, model=tiny_config("llama", pad_token_id=2)),
        "pad is the data's end": replace(good, model=tiny_config("llama", pad_token_id=2, eos_token_id=5)),
        "no padding": replace(good, model=tiny_config("llama", pad_token_id=None)),
        "data elsewhere": replace(good, data="nowhere"),
        "padded": replace(good, data=str(folder / "padded")),
        "router": replace(good, model=tiny_config("mixtral", router_aux_loss_coef=0.02)),
        "router loss off": replace(good, model=tiny_config("mixtral", router_aux_loss_coef=0.02), router=Router(loss=None)),
        "no loss of its own": replace(good, model=tiny_config("llama4_text", router_aux_loss_coef=0.001)),
        "no router loss": replace(good, model=tiny_config("mixtral", router_aux_loss_coef=0.0)),
        "mask": masked,
        "mask in bf16": replace(masked, attention="eager", deepspeed=str(folder / "bf16.json")),
        "no dense mask": replace(masked, attention="flex_attention"),
        "no mask": replace(masked, attention="varlen"),
        "indexer": replace(good, model=indexed, attention="eager"),
    }
    return dict(zip(recipes, run_ranks(_notes, 1, list(recipes.values()))[0], strict=True))


def _notes(recipes):
    from recipes.common.model.initial_weights import build_empty

    return [run_notes(recipe, build_empty(recipe.model, "eager")) for recipe in recipes]


@pytest.mark.parametrize("name", ["good", "no padding", "data elsewhere", "router", "no router loss", "no dense mask", "no mask"])
def test_nothing_to_tell(notes, name):
    assert notes[name] == []


@pytest.mark.parametrize(
    ("name", "beginning"),
    [
        ("pad is the end", "model.pad_token_id=2 is the end token too: "),
        ("pad is the data's end", "model.pad_token_id=2 is the end token too: "),
        ("padded", "data="),
        ("router loss off", "model.router_aux_loss_coef=0.02 does nothing here; router=Router(coefficient=0.02, loss=...) adds"),
        ("no loss of its own", "model.router_aux_loss_coef=0.001 does nothing here; router=Router(coefficient=0.001) adds"),
        ("mask", MASK.format("sdpa", 2 * 48 * 48)),
        ("mask in bf16", MASK.format("eager", 2 * 2 * 48 * 48)),
        ("indexer", "model.layers.0.self_attn.indexer."),
    ],
)
def test_it_is_told(notes, name, beginning):
    told = [note for note in notes[name] if note.startswith(beginning)]
    assert len(told) == 1, notes[name]
    if name == "padded":
        assert "450 of 45,000 tokens are padding (1 %), which is trained on like any other token" in told[0]
