"""Trains a SentencePiece BPE on text, and writes any BPE model as a Hugging Face folder with the same ids.

Decoding returns the text exactly: identity normalisation, no dummy prefix, whitespace runs kept, bytes for what the vocabulary
lacks. One exception: U+2581 is SentencePiece's own mark for a space and decodes as one. Control pieces written out in the text
(`</s>`) are ordinary text, as in SentencePiece (`split_special_tokens`).
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # ModelProto.SentencePiece.Type
BPE = 2  # TrainerSpec.ModelType
LINES_PER_SENTENCE = 16  # newlines stay inside a sentence, so pieces may hold them
SENTENCE_CHARACTERS = 1 << 15  # the trainer drops sentences over max_sentence_length bytes, and fails for words over 65,535


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """Split documents into runs of lines, and fold long ones: the trainer wants sentences far smaller than a document."""
    for text in texts:
        lines = text.splitlines(keepends=True)
        for start in range(0, len(lines), LINES_PER_SENTENCE):
            yield from _folded("".join(lines[start : start + LINES_PER_SENTENCE]).replace("\0", ""))


def _folded(sentence: str) -> Iterator[str]:
    """Yield pieces of SENTENCE_CHARACTERS at most, cut before a space where there is one."""
    start = 0
    while len(sentence) - start > SENTENCE_CHARACTERS:
        stop = start + SENTENCE_CHARACTERS
        space = sentence.rfind(" ", start + 1, stop)
        stop = stop if space < 0 else space
        yield sentence[start:stop]
        start = stop
    yield sentence[start:]


def train_bpe(texts: Iterable[str], vocab_size: int, threads: int) -> bytes:
    """Train a BPE model with byte fallback on `texts` and return it serialized. Ids: <unk> 0, <s> 1, </s> 2.

    Raises ValueError if `texts` cannot fill such a vocabulary.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9995,
            max_sentence_length=1 << 20,
            num_threads=threads,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(f"SentencePiece cannot train {vocab_size} pieces on this input: {error}") from error
    return model.getvalue()


def to_hugging_face(model: bytes) -> Tokenizer:
    """Return the same BPE as a `tokenizers.Tokenizer`. Raises ValueError for a model it cannot express, naming the reasons."""
    proto = model_pb2.ModelProto.FromString(model)
    problems = []
    if proto.trainer_spec.model_type != BPE:
        problems.append("model_type is not BPE")
    if proto.normalizer_spec.precompiled_charsmap:
        problems.append(f"normalization {proto.normalizer_spec.name!r} is not identity")
    if proto.normalizer_spec.add_dummy_prefix or proto.normalizer_spec.remove_extra_whitespaces:
        problems.append("add_dummy_prefix or remove_extra_whitespaces is on")
    if problems:
        raise ValueError(
            f"this SentencePiece model has no equal tokenizer.json: {'; '.join(problems)}; "
            "give the Hugging Face folder of the model as --tokenizer"
        )
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            _merges(vocab, scores),
            unk_token=proto.trainer_spec.unk_piece,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    if not any(SPACE in piece.lstrip(SPACE) for piece in scores):
        # No piece has a space after another character, so no merge crosses this split: it only makes the cache work.
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{SPACE}*[^{SPACE}]+|{SPACE}+"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    added = [piece for piece in proto.pieces if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(piece.piece, normalized=False, special=piece.type != USER_DEFINED) for piece in added])
    return tokenizer


def _merges(vocab: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """Return every way to build a piece from two others, best score first."""
    found = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                found.append((-score, vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def write_folder(model: bytes, folder: Path, sample: list[str]) -> None:
    """Write `folder` as a Hugging Face tokenizer (tokenizer.json, its config, and the .model itself).

    Raises ValueError if a document of `sample` gets other ids than from SentencePiece, or is not decoded exactly.
    """
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise ValueError(f"not a SentencePiece model ({str(error).splitlines()[0]})") from error
    tokenizer = to_hugging_face(model)
    check_equal(processor, tokenizer, sample)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer.model").write_bytes(model)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": processor.id_to_piece(processor.unk_id()),
        "bos_token": processor.id_to_piece(processor.bos_id()) if processor.bos_id() >= 0 else None,
        "eos_token": processor.id_to_piece(processor.eos_id()) if processor.eos_id() >= 0 else None,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "add_bos_token": False,
        "add_eos_token": False,
        "model_max_length": int(1e30),
    }
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def check_equal(processor: sentencepiece.SentencePieceProcessor, tokenizer: Tokenizer, sample: list[str]) -> None:
    """Raise ValueError unless both give the same ids for every document, and the ids decode to its text."""
    tokenizer.encode_special_tokens = True
    for text in sample:
        wanted = processor.encode(text)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if ids != wanted:
            at = next((i for i, pair in enumerate(zip(ids, wanted, strict=False)) if pair[0] != pair[1]), -1)
            raise ValueError(
                f"tokenizer.json and SentencePiece differ at token {at} of a document that begins {text[:60]!r}: "
                "give a Hugging Face folder as --tokenizer"
            )
        exact = SPACE not in text and processor.unk_id() not in wanted
        if exact and tokenizer.decode(ids, skip_special_tokens=False) != text:
            raise ValueError(f"tokenizer.json does not decode a document exactly; it begins {text[:60]!r}")
