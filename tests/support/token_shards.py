"""Prepared data folders of random tokens, as tools.data prepare would leave them, and all tokens of a split in one array."""

import hashlib
import json

import numpy as np

from recipes.common.data.shards import FORMAT, ORIGIN, VERSION, tokenizer_hash

SEQ_LEN = 32


def write_split(folder, split, shard_tokens, dtype, rng):
    """Shards of random tokens: (manifest entry, all tokens in one array)."""
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


def write_data(folder, *, train=(1000, 7, 20, 2000, 333), validation=(500, 200), dtype="uint16"):
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
