"""Writes data for planted runs: a small made-up language in several shards, as tools.data prepare would leave it.

Every word has a few usual successors, and every document a topic whose words come more often, so that a tiny model learns
something in tens of steps and sequences differ in how hard they are.
"""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from pathlib import Path

import numpy as np

from recipes.common.data.order import sequence_position
from recipes.common.data.shards import FORMAT, ORIGIN, VERSION, tokenizer_hash

VOCAB = 192
EOS = 2
FIRST_WORD = 3
SHARDS = 6
SUCCESSORS = 4  # of a word


def write_language(
    folder: Path, *, seed: int, tokens: int = 60_000, patches: dict[int, np.ndarray] | None = None, seq_len: int = 0
) -> Path:
    """Write a data folder. `patches`: position -> the ids of a sequence that are put there before checksums are taken."""
    rng = np.random.default_rng(seed)
    ids, ends = _documents(rng, tokens)
    for position, sequence in (patches or {}).items():
        start = position * seq_len
        ids[start : start + len(sequence)] = sequence
    _write_tokenizer(folder / "tokenizer")
    splits = {"train": _write_split(folder, "train", ids, ends, SHARDS)}
    held_out, held_out_ends = _documents(rng, tokens // 10)
    splits["validation"] = _write_split(folder, "validation", held_out, held_out_ends, 1)
    (folder / "files.jsonl").write_text(json.dumps({"path": "language.txt", "kind": "text"}) + "\n")
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": "uint16",
        "vocab_size": VOCAB,
        "eos_id": EOS,
        "tokenizer_hash": tokenizer_hash(folder / "tokenizer"),
        "sources": [{"name": "language"}],
        "splits": splits,
    }
    (folder / "dataset.json").write_text(json.dumps(manifest))
    return folder


def position_of(run_seed: int, index: int, tokens: int, seq_len: int) -> int:
    """Return where the index-th sequence of a run lies in `write_language`'s train split."""
    return int(sequence_position(run_seed, np.array([index]), (tokens - 1) // seq_len)[0])


def bad_sequence(kind: str, seq_len: int, rng: np.random.Generator) -> np.ndarray:
    """Return ids, int64 [seq_len + 1], of a document that does not belong: "noise", "repeat" or "rare"."""
    if kind == "noise":  # binary taken for text
        return rng.integers(FIRST_WORD, VOCAB, seq_len + 1)
    if kind == "repeat":  # a table of one cell over and over
        words = rng.integers(FIRST_WORD, VOCAB, 3)
        return np.resize(words, seq_len + 1)
    return rng.integers(VOCAB - 12, VOCAB, seq_len + 1)  # words that the language hardly uses


def _documents(rng: np.random.Generator, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids [tokens], where documents end). The last twelve words are rare."""
    words = VOCAB - FIRST_WORD
    successors = rng.integers(0, words - 12, (words, SUCCESSORS))
    popular = 1.0 / np.arange(1, words + 1) ** 0.8
    popular[-12:] *= 0.02
    popular /= popular.sum()
    ids = np.empty(tokens, dtype=np.int64)
    ends, at = [], 0
    while at < tokens:
        length = min(int(rng.integers(60, 400)), tokens - at)
        topic = rng.choice(words, 10, p=popular)
        kinds, choice = rng.random(length), rng.integers(0, SUCCESSORS, length)
        free = np.where(rng.random(length) < 0.5, rng.choice(topic, length), rng.choice(words, length, p=popular))
        word = int(topic[0])
        for i in range(length - 1):
            word = int(successors[word, choice[i]]) if kinds[i] < 0.8 else int(free[i])
            ids[at + i] = FIRST_WORD + word
        ids[at + length - 1] = EOS
        at += length
        ends.append(at)
    return ids, np.array(ends)


def _write_split(folder: Path, split: str, ids: np.ndarray, ends: np.ndarray, shards: int) -> dict:
    written = []
    cuts = [0, *(int(ends[len(ends) * k // shards - 1]) for k in range(1, shards + 1))]
    for number, (start, stop) in enumerate(pairwise(cuts)):
        stem = f"{split}_{number:05d}"
        mine = ends[(ends > start) & (ends <= stop)] - start
        origins = np.zeros(len(mine), dtype=ORIGIN)
        origins["offset"] = np.concatenate([[0], mine[:-1]]) + start
        files = {
            f"{stem}.bin": ids[start:stop].astype("<u2").tobytes(),
            f"{stem}.ends": mine.astype("<u8").tobytes(),
            f"{stem}.origins": origins.tobytes(),
        }
        for name, content in files.items():
            (folder / name).write_bytes(content)
        checksums = {name: "sha256:" + hashlib.sha256(content).hexdigest() for name, content in files.items()}
        written.append({"file": f"{stem}.bin", "tokens": stop - start, "documents": len(mine), "checksums": checksums})
    return {"tokens": len(ids), "documents": len(ends), "shards": written}


def _write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True)
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(FIRST_WORD, VOCAB))]
    content = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
