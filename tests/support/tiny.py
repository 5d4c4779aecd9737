"""Makes tiny models and recipes for tests: every width small, nothing that a layout divides by accident."""

import json
from pathlib import Path

import numpy as np
from transformers import AutoConfig, PreTrainedConfig

from recipes.common.recipe import AdamW, Batch, Checkpoints, Constant, Evaluation, Layout, Recipe

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 131  # a prime
FAMILIES = ["llama", "qwen3", "gemma2", "olmo2", "phi3", "mixtral", "gpt2"]

_WIDTHS = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "attention_dropout": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def tiny_config(family: str, **fields: object) -> PreTrainedConfig:
    """Return a small config of a transformers model type; `fields` override."""
    default = AutoConfig.for_model(family)
    return AutoConfig.for_model(family, **{k: v for k, v in {**_WIDTHS, **fields}.items() if hasattr(default, k)})


def ds_config(name: str) -> dict:
    return json.loads((ROOT / "ds_configs" / name).read_text())


def write_shards(folder: Path, *, tokens: int = 40_000, seed: int = 0) -> None:
    """Write a prepared data folder of random ids, as tools.data prepare would leave it, with a tokenizer that is only hashed."""
    import hashlib

    from recipes.common.data.shards import FORMAT, VERSION, tokenizer_hash

    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {}}}))
    splits = {}
    for split, count in (("train", tokens), ("validation", tokens // 8)):
        ids = np.random.default_rng(seed).integers(3, VOCAB, count).astype("<u2")
        name = f"{split}_00000.bin"
        (folder / name).write_bytes(ids.tobytes())
        checksums = {name: "sha256:" + hashlib.sha256(ids.tobytes()).hexdigest()}
        shard = {"file": name, "tokens": count, "documents": 1, "checksums": checksums}
        splits[split] = {"tokens": count, "documents": 1, "shards": [shard]}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": "uint16",
        "vocab_size": VOCAB,
        "eos_id": 2,
        "tokenizer_hash": tokenizer_hash(folder / "tokenizer"),
        "splits": splits,
    }
    (folder / "dataset.json").write_text(json.dumps(manifest))


def tiny_recipe(folder: Path, **fields: object) -> Recipe:
    """Return a recipe: a llama of 4 layers on `folder` (see write_shards), 8 steps; `fields` override."""
    values = {
        "name": "tiny",
        "model": tiny_config("llama"),
        "num_params": 140_224,
        "tokenizer": str(folder / "tokenizer"),
        "data": str(folder),
        "layouts": {1: Layout(), 2: Layout(pipeline=2), 4: Layout(tensor=2, pipeline=2), 8: Layout(tensor=2, pipeline=2)},
        "batch": Batch(seq_len=16, micro_seqs=1, global_seqs=4),
        "optimizer": AdamW(lr=1e-3, eps=1e-6, clip=0.5),
        "schedule": Constant(warmup_steps=2),
        "steps": 8,
        "evaluation": Evaluation(every_steps=4, seqs=8),
        "checkpoints": Checkpoints(every_steps=4),
        "deepspeed": "zero1_fp32.json",
    }
    return Recipe(**(values | fields))
