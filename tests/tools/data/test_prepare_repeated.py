"""A preparation that is repeated, or refused: what lies in OUT is told from what the user gave."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tools.data import __main__ as data


@pytest.fixture
def tokenizer(tmp_path):
    """Write a small tokenizer, and return its folder."""
    folder = tmp_path / "words"
    folder.mkdir()
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "one": 1, "two": 2, "</s>": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return folder


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("one two")
    (folder / "b.jsonl").write_text('{"text": "two one two"}\n')
    return folder


def prepare(corpus, tokenizer, out, *more):
    command = ["prepare", str(corpus), "--tokenizer", str(tokenizer), "--out", str(out), "--validation-fraction", "0"]
    return data.main([*command, "--workers", "1", *more])


@pytest.mark.parametrize("length", [-1, 2**24 + 1, 10**15, 10**30])
def test_a_sequence_that_fits_no_memory_is_refused_before_work(corpus, tokenizer, tmp_path, capsys, length):
    assert prepare(corpus, tokenizer, tmp_path / "out", "--best-fit", str(length)) == 2
    wanted = f"error: --best-fit {length}: must be a sequence length of at most 16777216 tokens, or 0\n"
    assert capsys.readouterr().err == wanted
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("linked", [False, True])
def test_out_within_an_input_is_never_input(corpus, tokenizer, tmp_path, capsys, linked):
    out = corpus / "z" / "out"
    out.parent.mkdir()
    (out.parent / "c.txt").write_text("two two")
    named = tmp_path / "elsewhere" if linked else out
    if linked:
        out.mkdir()
        named.symlink_to(out)
    for words in ("prepared", "already prepared, nothing to do"):
        assert prepare(corpus, tokenizer, named, "--each-line") == 0
        shown = capsys.readouterr()
        assert shown.out.startswith(f"{named}: {words}\n")
    assert f"left out of {corpus}: 1 folder of --out ({out})" in shown.err
    names = [json.loads(line)["path"] for line in (out / "files.jsonl").read_text().splitlines()]
    assert names == [str(corpus / "a.txt"), str(corpus / "b.jsonl"), str(out.parent / "c.txt")]
    (corpus / "a.txt").write_text("one two one")
    assert prepare(corpus, tokenizer, named, "--each-line") == 2
    assert "prepared from other inputs or options" in capsys.readouterr().err


@pytest.fixture
def interrupted(corpus, tokenizer, tmp_path, monkeypatch):
    """Return a folder whose preparation ended after its units, and before its manifest."""
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("tools.data.prepare.files_listing", lambda files: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(corpus, tokenizer, out)
    return out


@pytest.mark.parametrize("content", [b"", b'{"inputs_ha', b'"sha256:', b"[]", b"{}", b"\xff", b"\x00\x00"])
@pytest.mark.parametrize("name, then", [("inputs.json", "starts over"), ("unit_00000.json", "writes that unit again")])
def test_what_an_interrupted_run_left_is_named_where_it_is_damaged(corpus, tokenizer, interrupted, capsys, content, name, then):
    path = interrupted / "unfinished" / name
    path.write_bytes(content)
    assert prepare(corpus, tokenizer, interrupted) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {path}: ") and error.endswith(f"; delete this file, and the same command {then}")
    path.unlink()
    assert prepare(corpus, tokenizer, interrupted) == 0
    assert "continuing: 1 of 1 units" not in capsys.readouterr().err


def test_an_interrupted_run_continues_and_a_damaged_manifest_is_named(corpus, tokenizer, interrupted, capsys):
    assert prepare(corpus, tokenizer, interrupted) == 0
    assert "continuing: 1 of 1 units are done" in capsys.readouterr().err
    for content in ('{"inputs_hash', "{}", "[]"):
        (interrupted / "dataset.json").write_text(content)
        assert prepare(corpus, tokenizer, interrupted) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {interrupted / 'dataset.json'}") and error.count("\n") == 1
        assert error.endswith(f"prepare again, but first delete {interrupted} or choose another --out\n")
