"""Finds, converts or trains the tokenizer of a preparation, and copies it beside the shards."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from tokenizers import Tokenizer

from tools.common.console import UsageError
from tools.data.inputs import InputFile, InputRange
from tools.data.readers import read_range
from tools.data.sentencepiece_bpe import train_bpe, write_folder

SAMPLE_BYTES = 16 << 20  # text that a tokenizer is trained on
SAMPLE_SEED = 20
CHECKED_DOCUMENTS = 200  # encoded both ways when a SentencePiece model is converted to tokenizer.json
COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "chat_template.jinja")


def find_tokenizer(name: str) -> Path:
    """Return the file that defines the tokenizer `name`: a tokenizer.json, or a SentencePiece .model.

    A `name` that is no path is looked up on the Hugging Face hub (its files are fetched once, into the hub's cache).
    """
    path = Path(name)
    if path.is_file() and (path.name == "tokenizer.json" or path.suffix == ".model"):
        return path
    for found in (path / "tokenizer.json", path / "tokenizer.model"):
        if found.is_file():
            return found
    if not path.exists() and name.count("/") <= 1 and not name.startswith((".", "/")):
        import huggingface_hub

        try:
            folder = huggingface_hub.snapshot_download(name, allow_patterns=list(COPIED))
        except Exception as error:  # offline, unknown, gated: the library raises many kinds
            raise UsageError(f"--tokenizer {name}: no such path, and the hub answered: {error}") from error
        if (Path(folder) / "tokenizer.json").is_file():
            return Path(folder) / "tokenizer.json"
    raise UsageError(f"--tokenizer {name}: neither a folder with tokenizer.json or tokenizer.model, nor such a file")


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_tokenizer(
    folder: Path, found: Path | None, vocab_size: int, files: list[InputFile], units: list[list[InputRange]], text_key: str
) -> None:
    """Write `folder` as a Hugging Face tokenizer: a copy of `found`, or one trained on a sample if that is None.

    An interrupted call leaves no folder. Raises UsageError or ValueError.
    """
    if (folder / "tokenizer.json").is_file():
        return
    part = folder.with_name("tokenizer.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    if found is None:
        sample = sample_texts(files, units, text_key, SAMPLE_BYTES)
        if not sample:
            raise UsageError("--train-tokenizer: the input holds no text")
        size = sum(len(text) for text in sample) / 1e6
        print(f"training a tokenizer of {vocab_size} pieces on {size:.1f} MB of text", file=sys.stderr, flush=True)
        model = train_bpe(sample, vocab_size, threads=len(os.sched_getaffinity(0)))
        write_folder(model, part, sample[:CHECKED_DOCUMENTS])
    elif found.suffix == ".model":
        write_folder(found.read_bytes(), part, sample_texts(files, units, text_key, SAMPLE_BYTES)[:CHECKED_DOCUMENTS])
    else:
        for name in COPIED:
            if (found.parent / name).is_file():
                shutil.copyfile(found.parent / name, part / name)
    os.rename(part, folder)


def sample_texts(files: list[InputFile], units: list[list[InputRange]], text_key: str, limit_bytes: int) -> list[str]:
    """Return readable documents, about `limit_bytes` in all, spread over every source; the same ones every time."""
    by_source: dict[int, list[int]] = {}
    for number, unit in enumerate(units):
        for source in {files[part.file].source for part in unit}:
            by_source.setdefault(source, []).append(number)
    rng = random.Random(SAMPLE_SEED)
    for numbers in by_source.values():
        rng.shuffle(numbers)
    order = [number for turn in zip_longest(*by_source.values()) for number in turn if number is not None]
    order = list(dict.fromkeys(order))
    each = max(limit_bytes // min(len(order), max(64, len(by_source))), 1)
    texts, total = [], 0
    for number in order:
        for text, size in _texts_of(files, units[number], text_key, each):
            texts.append(text)
            total += size
        if total >= limit_bytes:
            break
    return texts


def _texts_of(files: list, unit: list[InputRange], text_key: str, limit_bytes: int) -> Iterator[tuple[str, int]]:
    total = 0
    for part in unit:
        for document in read_range(files[part.file], part, text_key):
            if document.text:
                yield document.text, len(document.text)
                total += len(document.text)
                if total >= limit_bytes:
                    return


def end_token(folder: Path, tokenizer: Tokenizer) -> int:
    """Return the id that ends each document: `eos_token` of tokenizer_config.json. Raises UsageError without one."""
    config = folder / "tokenizer_config.json"
    token = json.loads(config.read_text(encoding="utf-8")).get("eos_token") if config.is_file() else None
    token = token["content"] if isinstance(token, dict) else token
    found = tokenizer.token_to_id(token) if token else None
    if found is None:
        raise UsageError(
            f"the tokenizer has no end token: set eos_token in tokenizer_config.json beside its tokenizer.json "
            f"(eos_token={token!r} is not one of its tokens)"
        )
    return found
