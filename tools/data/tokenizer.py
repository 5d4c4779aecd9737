"""Converts or trains the tokenizer of a preparation, and copies it beside the shards."""

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

from tokenizers import Tokenizer, models

from recipes.common.config.json_files import read_json
from tools.common.console import UsageError
from tools.data.encoders import encode_lists
from tools.data.inputs import InputFile, InputRange
from tools.data.readers import read_range
from tools.data.sentencepiece_bpe import train_bpe, write_folder
from tools.data.tokenizer_file import FOLDER, copied_files

SAMPLE_BYTES = 16 << 20  # text that a tokenizer is trained on
SAMPLE_SEED = 20
CHECKED_DOCUMENTS = 200  # encoded both ways when a SentencePiece model is converted to tokenizer.json


def file_hashes(found: Path) -> list[list[str]]:
    """Return the name and hash of every file taken from the tokenizer that `found` defines: its ids, and its end token."""
    hashes = []
    for path in copied_files(found):
        with open(path, "rb") as file:
            hashes.append([path.name, hashlib.file_digest(file, "sha256").hexdigest()])
    return hashes


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
        for path in copied_files(found):
            shutil.copyfile(path, part / path.name)
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


def end_token(folder: Path, tokenizer: Tokenizer, found: Path | None = None) -> int:
    """Return the id that ends each document: `eos_token` of tokenizer_config.json. Raises UsageError without one.

    found: the file that `folder` was made from, for the message: what is set beside it is copied anew.
    """
    config = folder / "tokenizer_config.json"
    token = read_json(config).get("eos_token") if config.is_file() else None
    token = token.get("content") if isinstance(token, dict) else token
    eos_id = tokenizer.token_to_id(token) if isinstance(token, str) and token else None
    if eos_id is None and found is not None and found.suffix == ".model":
        raise UsageError(f"{found}: the SentencePiece model has no end token; {FOLDER}")
    if eos_id is None:
        raise UsageError(
            f"the tokenizer has no end token: set eos_token in {(found.parent if found else folder) / config.name} "
            f"(eos_token={token!r} is not one of its tokens)"
        )
    return eos_id


def check_knows(tokenizer: Tokenizer, sample: list[str]) -> None:
    """Raise UsageError for a tokenizer that turns text to nothing, or into its unknown token alone."""
    model = tokenizer.model
    if isinstance(model, models.Unigram):
        unknown = json.loads(tokenizer.to_str())["model"]["unk_id"]  # the library has no attribute for it
    else:
        unknown = tokenizer.token_to_id(model.unk_token) if model.unk_token else None
    texts = [text for text in sample if text.strip()][:CHECKED_DOCUMENTS]
    ids = {id for each in encode_lists(tokenizer, texts) for id in each}
    if texts and not ids - {unknown}:
        became = "its unknown token" if ids else "nothing"
        raise UsageError(f"the tokenizer turns the text into {became}: it was made for another language or is not whole")
