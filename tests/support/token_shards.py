"""Writes prepared data in several shards of random tokens, and returns the same tokens in one array."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from recipes.common.data.shards import FORMAT, ORIGIN, VERSION, tokenizer_hash

SEQ_LEN = 32


def write_split(
    folder: Path, split: str, shard_tokens: tuple[int, ...], dtype: str, rng: np.random.Generator
) -> tuple[dict[str, Any], np.ndarray]:
    """Write shards of random tokens and return (manifest entry, all tokens in one array)."""
    shards, parts = [], []
    for number, count in enumerate(shard_tokens):
        tokens = rng.integers(0, 1000, count).astype(dtype)
        ends = np.unique(np.append(rng.integers(1, count, min(count - 1, 5)), count)).astype("<u8")
        name = f"{split}_{number:05d}"
        values = {"bin": tokens, "ends": ends, "origins": np.zeros(len(ends), ORIGIN)}
        checksums = {}
        for end, array in values.items():
            (folder / f"{name}.{end}").write_bytes(array.tobytes())
            checksums[f"{name}.{end}"] = "sha256:" + hashlib.sha256(array.tobytes()).hexdigest()
        shards.append({"file": f"{name}.bin", "tokens": count, "documents": len(ends), "checksums": checksums})
        parts.append(tokens)
    entry = {"tokens": sum(shard_tokens), "documents": sum(shard["documents"] for shard in shards), "shards": shards}
    return entry, np.concatenate(parts).astype(np.int64)


def write_data(
    folder: Path,
    *,
    train: tuple[int, ...] = (1000, 7, 20, 2000, 333),
    validation: tuple[int, ...] = (500, 200),
    dtype: str = "uint16",
) -> dict[str, np.ndarray]:
    """Write a prepared folder and return {split: all its tokens in one array}. Arguments: tokens of each shard."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text('{"model": {"vocab": {}}, "padding": null}')
    splits, oracle = {}, {}
    for split, shard_tokens in (("train", train), ("validation", validation)):
        splits[split], oracle[split] = write_split(folder, split, shard_tokens, dtype, rng)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer_hash": tokenizer_hash(folder / "tokenizer"),
        "vocab_size": 1000,
        "eos_id": 2,
        "dtype": dtype,
        "splits": splits,
    }
    (folder / "dataset.json").write_text(json.dumps(manifest))
    return oracle
