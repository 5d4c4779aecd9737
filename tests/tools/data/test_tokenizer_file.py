"""A tokenizer that cannot be used is refused before any work, with what to do."""

import base64
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tools.common.console import UsageError
from tools.data import __main__ as data
from tools.data.encoders import reference_tokenizer
from tools.data.sentencepiece_bpe import SENTENCE_CHARACTERS, sentences, train_bpe
from tools.data.tokenizer import check_knows, end_token
from tools.data.tokenizer_file import find_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 499723\n"
TIKTOKEN = "".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))


@pytest.mark.parametrize(
    "name, content, cure",
    [
        ("tokenizer.model", TIKTOKEN, "a tiktoken file.*give the Hugging Face folder"),
        ("qwen.tiktoken", TIKTOKEN, "a tiktoken file.*give the Hugging Face folder"),
        ("tokenizer.model", POINTER, "Git LFS pointer.*git lfs pull"),
        ("tokenizer.json", POINTER, "Git LFS pointer.*git lfs pull"),
        ("tokenizer.model", "", "empty; fetch it again"),
        ("tokenizer.json", "", "empty; fetch it again"),
        ("tokenizer.json", '{"model": {"vocab": {"a"', "no JSON.*fetch it again"),
        ("tokenizer.json", "[" * 100_000, "nested too deeply"),
        ("tokenizer.json", "[]", "holds list where an object belongs"),
        ("tokenizer.json", "{}", "it has no model"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "its vocabulary is empty"),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0}, "dropout": 0.3}}', "model.dropout=0.3 gives other ids.*set it to null"),
        ("vocab.json", "{}", "write a tokenizer.json with: python -c"),
        ("notes.txt", "", "there is notes.txt"),
    ],
)
def test_what_is_no_tokenizer_is_named_with_the_cure(tmp_path, capsys, name, content, cure):
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=cure):
        find_tokenizer(str(tmp_path))
    (tmp_path / "a.txt").write_text("text")
    assert data.main(["prepare", str(tmp_path / "a.txt"), "--tokenizer", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().err.count("error: ") == 1


@pytest.mark.parametrize("dropout", [None, 0.0])
def test_a_bpe_without_dropout_is_taken(tmp_path, dropout):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"type": "BPE", "dropout": dropout, "vocab": {"a": 0}, "merges": []}}))
    assert find_tokenizer(str(tmp_path)) == path


def test_a_link_to_elsewhere_is_refused(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    (folder / "tokenizer.json").symlink_to("../tokenizer.json")
    with pytest.raises(UsageError, match=r"'tokenizer.json' is a link to .*, out of the folder"):
        find_tokenizer(str(folder))


def test_a_file_that_the_library_cannot_read_is_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": {"type": "New", "vocab": {"a": 0}}}')
    with pytest.raises(UsageError, match=r"tokenizer.json: the `tokenizers` library cannot read it"):
        reference_tokenizer(str(path))


def test_a_sentencepiece_model_that_is_none_is_one_message(tmp_path, capsys):
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x05ab\xff\xff" * 20)
    (tmp_path / "a.txt").write_text("text")
    assert data.main(["prepare", str(tmp_path / "a.txt"), "--tokenizer", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "not a SentencePiece model" in capsys.readouterr().err


@pytest.mark.parametrize("eos", [5, ["</s>"], {"content": 3}, {}, "no such token"])
def test_an_end_token_of_a_wrong_kind_is_one_message(tmp_path, capsys, eos):
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "text": 1, "</s>": 2}, unk_token="[UNK]"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    (tmp_path / "a.txt").write_text("text")
    assert data.main(["prepare", str(tmp_path / "a.txt"), "--tokenizer", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "the tokenizer has no end token: set eos_token" in capsys.readouterr().err


def end_ids(out):
    """Return the end tokens that prepared data names, and the last one written."""
    manifest = json.loads((out / "dataset.json").read_text())
    return manifest["eos_id"], int(np.fromfile(out / "train_00000.bin", dtype=manifest["dtype"])[-1])


def test_the_end_token_that_is_set_is_the_one_written(tmp_path, capsys):
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "text": 1, "</s>": 2, "<end>": 3}, unk_token="[UNK]"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config, out = tmp_path / "tokenizer_config.json", tmp_path / "out"
    (tmp_path / "a.txt").write_text("text")
    command = ["prepare", str(tmp_path / "a.txt"), "--tokenizer", str(tmp_path), "--validation-fraction", "0", "--out"]
    for content in (None, '{"eos_token": "gone"}', '{"eos_'):
        if content:
            config.write_text(content)
        assert data.main([*command, str(out)]) == 2
        assert ("no JSON" if content == '{"eos_' else f"set eos_token in {config} (") in capsys.readouterr().err
    config.write_text('{"eos_token": "</s>"}')
    assert data.main([*command, str(out)]) == 0  # the cure is read, though OUT kept an old copy
    assert end_ids(out) == (2, 2)
    assert data.main([*command, str(out)]) == 0
    assert "already prepared" in capsys.readouterr().out
    config.write_text('{"eos_token": "<end>"}')
    assert data.main([*command, str(out)]) == 2
    assert "prepared from other inputs or options" in capsys.readouterr().err
    assert data.main([*command, str(tmp_path / "new")]) == 0
    assert end_ids(tmp_path / "new") == (3, 3)


def test_a_sentencepiece_model_without_an_end_token_is_named(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    with pytest.raises(UsageError, match=r"my.model: the SentencePiece model has no end token; give the Hugging Face folder"):
        end_token(tmp_path, tokenizer, tmp_path / "my.model")


def test_a_tokenizer_that_knows_nothing_of_the_text_is_refused():
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "known": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    check_knows(tokenizer, ["", "known", "other"])
    check_knows(tokenizer, [])
    with pytest.raises(UsageError, match="turns the text into its unknown token"):
        check_knows(tokenizer, ["some other words"])
    with pytest.raises(UsageError, match="turns the text into nothing"):
        check_knows(Tokenizer(models.BPE({"</s>": 0}, [])), ["some words"])


def test_a_unigram_whose_only_id_is_the_unknown_one_is_refused():
    tokenizer = Tokenizer(models.Unigram([("known", -1.0), ("<unk>", 0.0)], 1, False))
    check_knows(tokenizer, ["known", "other"])
    with pytest.raises(UsageError, match="turns the text into its unknown token"):
        check_knows(tokenizer, ["some"])


@pytest.mark.parametrize(
    "model",
    [
        models.Unigram([(piece, -1.0) for piece in ("t", "e", "x", "text")]),
        models.WordLevel({"text": 0, "</s>": 1}),
        models.WordPiece({"text": 0}),
    ],
    ids=["Unigram", "WordLevel", "WordPiece"],
)
def test_text_that_needs_a_missing_unknown_token_is_one_message(tmp_path, capsys, model):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "a.jsonl").write_text('{"text": "text text"}\n' * 500 + '{"text": "other"}\n')  # the last, beyond what is sampled
    command = ["prepare", str(tmp_path / "a.jsonl"), "--tokenizer", str(tmp_path), "--out", str(tmp_path / "out")]
    assert data.main(command) == 2
    assert "cannot encode the text: " in (error := capsys.readouterr().err) and "unk_id or unk_token" in error
    (tmp_path / "a.jsonl").write_text('{"text": "text text"}\n' * 2)
    assert data.main([*command, "--validation-fraction", "0"]) == 0  # no text that needs it


def test_long_lines_are_folded_and_take_part_in_training():
    words = " ".join(f"w{number % 97}" for number in range(40_000))  # one line of 150 kB
    texts = [words, "漢" * 100_000, "short\nlines\n" * 40, "x" * SENTENCE_CHARACTERS]
    pieces = [list(sentences([text])) for text in texts]
    assert ["".join(found) for found in pieces] == texts
    assert max(len(piece) for found in pieces for piece in found) <= SENTENCE_CHARACTERS
    assert all(piece.startswith(" ") for piece in pieces[0][1:])
    assert len(pieces[2]) == 5 and len(pieces[3]) == 1
    assert len(train_bpe(texts, 290, threads=1)) > 1000
