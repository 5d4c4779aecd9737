"""Encodes text to ids: Hugging Face `tokenizers` is the reference, `fastokens` (optional) is used where it gives the same ids.

They are compared on a sample of every source before the run and on documents spread over it. Both treat control tokens written
out in a document as ordinary text.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tokenizers import Tokenizer

from tools.common.console import UsageError

REFERENCE, FAST = "tokenizers", "fastokens"
Encode = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]  # texts -> (ids uint32 [tokens], offsets int64 [texts + 1])
TRICKY = ["", " ", "\r\n\t ", "\0", "</s><|endoftext|><s>", "é漢字🙂\u200d", "  \u00a0x", "a" * 1000, " " * 1000, "1234567890"]


def reference_tokenizer(tokenizer_file: str) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json, which takes control tokens in a text as text. Raises UsageError."""
    try:
        tokenizer = Tokenizer.from_file(tokenizer_file)
    except Exception as error:  # the library raises no other kind
        raise UsageError(f"{tokenizer_file}: the `tokenizers` library cannot read it: {error}") from error
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def encode_lists(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Return the ids of each text. Raises UsageError for a text that the tokenizer cannot take, one without an unknown token."""
    try:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    except Exception as error:  # the library raises no other kind
        raise UsageError(
            f"the tokenizer cannot encode the text: {error}; set the unknown token of its model (unk_id or unk_token in "
            f"tokenizer.json), or choose another --tokenizer"
        ) from error


def load_encoder(name: str, tokenizer_file: str) -> Encode:
    """Return the encoder `name` for a tokenizer.json. Raises ImportError if its package is missing."""
    if name == REFERENCE:
        tokenizer = reference_tokenizer(tokenizer_file)

        def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
            lists = encode_lists(tokenizer, texts)
            offsets = np.zeros(len(lists) + 1, dtype=np.int64)
            np.cumsum([len(ids) for ids in lists], out=offsets[1:])
            flat = np.empty(offsets[-1], dtype=np.uint32)
            for row, ids in enumerate(lists):
                flat[offsets[row] : offsets[row + 1]] = ids
            return flat, offsets

        return encode
    import fastokens

    fast = fastokens.Tokenizer.from_file(tokenizer_file)
    fast.no_padding()
    fast.no_truncation()

    def encode_fast(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = fast.encode_batch_flat(texts, add_special_tokens=False, split_special_tokens=True)
        return np.frombuffer(ids, dtype="<u4"), np.frombuffer(offsets, dtype="<u8").astype(np.int64)

    return encode_fast


def first_difference(encode: Encode, reference: Encode, texts: list[str]) -> int | None:
    """Return the index of the first text with other ids; None if all are equal."""
    (ids, offsets), (wanted, wanted_offsets) = encode(texts), reference(texts)
    if np.array_equal(offsets, wanted_offsets) and np.array_equal(ids, wanted):
        return None
    for row in range(len(texts)):
        here = ids[offsets[row] : offsets[row + 1]]
        if not np.array_equal(here, wanted[wanted_offsets[row] : wanted_offsets[row + 1]]):
            return row
    raise AssertionError("offsets differ but no text does")


def choose_encoder(choice: str, tokenizer_file: str, sample: list[str]) -> tuple[str, str]:
    """Return (encoder, why): the fast one if it is installed and gives the reference's ids for `sample`.

    `choice` is "auto" or a name; a named encoder that cannot be used raises UsageError, and is never replaced by another.
    """
    if choice == REFERENCE:
        return REFERENCE, "as asked for"
    try:
        fast = load_encoder(FAST, tokenizer_file)
        texts = [*TRICKY, *sample]
        different = first_difference(fast, load_encoder(REFERENCE, tokenizer_file), texts)
        reason = None if different is None else f"{FAST} gives other ids for {texts[different][:60]!r}"
    except ImportError:
        reason = f"{FAST} is not installed (pip install {FAST}: much faster, and checked to give the same ids)"
    except Exception as error:  # the package raises many kinds for tokenizers it does not know
        reason = f"{FAST} cannot read this tokenizer ({error})"
    if reason is None:
        return FAST, f"equal to {REFERENCE} on {len(texts)} sampled documents"
    if choice == FAST:
        raise UsageError(f"--encoder {FAST}: {reason}")
    return REFERENCE, reason
