"""Prepared shards hold SentencePiece's own ids for every document, whatever the input's format."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from transformers import AutoTokenizer

from recipes.common.data.shards import ORIGIN, data_problems, read_manifest, split_shards
from recipes.common.run_dir import lease
from tools.common.console import UsageError
from tools.common.forked_ranks import run_ranks
from tools.data import __main__ as data
from tools.data import encoders, shard_writer
from tools.data.shard_writer import is_validation

ROOT = Path(__file__).resolve().parents[3]
WORDS = [
    "def",
    "return",
    "x",
    "self.value",
    "    ",
    "\n",
    "\n\n",
    "\t",
    "(",
    "):",
    "é",
    "漢字",
    "🙂",
    "</s>",
    "0x1F",
    " ",
    "<",
    "/",
    ">",
    "|",
]
SYLLABLES = ["ta", "ri", "fol", "dem", "os", "kra", "ne", "ul"]


def main(arguments):
    return data.main(["prepare", *arguments])


def random_text(rng, words=400):
    words = [WORDS[i] for i in rng.integers(0, len(WORDS), words)]
    words += ["".join(SYLLABLES[i] for i in rng.integers(0, 8, 3)) for _ in words]
    return " ".join(words[i] for i in rng.permutation(len(words)))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Write a folder of text and JSON lines, and {(file, offset): text}."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    documents = {}
    for number in range(30):
        path = folder / f"text_{number:02d}.txt"
        path.write_text(random_text(rng), newline="")
        documents[str(path), 0] = path.read_bytes().decode()
    for name, opener in (("a.jsonl", open), ("b.jsonl.gz", gzip.open)):
        path, at = folder / name, 0
        with opener(path, "wb") as file:
            for line_number in range(1, 121):
                text = random_text(rng)
                line = json.dumps({"text": text, "id": line_number}).encode() + b"\n"
                documents[str(path), line_number if name.endswith(".gz") else at] = text
                file.write(line)
                at += len(line)
    return folder, documents


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "data"
    arguments = [str(corpus[0]), "--train-tokenizer", "400", "--out", str(out), "--validation-fraction", "0.1"]
    assert main([*arguments, "--workers", "1"]) == 0
    return out, arguments


def read_documents(out):
    """Return {(split, file path, offset): ids}, and check the manifest's counts."""
    manifest = read_manifest(out)
    paths = [json.loads(line)["path"] for line in (out / "files.jsonl").read_text().splitlines()]
    found = {}
    for split in manifest["splits"]:
        for shard in split_shards(manifest, split):
            tokens = np.fromfile(out / shard.file, dtype=manifest["dtype"])
            ends = np.fromfile((out / shard.file).with_suffix(".ends"), dtype="<u8")
            origins = np.fromfile((out / shard.file).with_suffix(".origins"), dtype=ORIGIN)
            assert len(tokens) == shard.tokens == ends[-1] and len(ends) == len(origins) == shard.documents
            for ids, origin in zip(np.split(tokens, ends[:-1].astype(int)), origins, strict=True):
                found[split, paths[origin["file"]], int(origin["offset"])] = ids.tolist()
    return found


def folder_bytes(out):
    return {path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_ids_of_every_document_equal_sentencepiece(corpus, prepared):
    out, _ = prepared
    processor = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer" / "tokenizer.model"))
    oracle = {}
    for (path, offset), text in corpus[1].items():
        split = "validation" if is_validation(text.encode(), 0.1) else "train"
        oracle[split, path, offset] = [*processor.encode(text), processor.eos_id()]
    assert read_documents(out) == oracle
    assert {split for split, *_ in oracle} == {"train", "validation"}


def test_several_processes_write_the_same_bytes(corpus, prepared, tmp_path):
    out, arguments = prepared
    again = [*arguments, "--workers", "2"]
    again[again.index(str(out))] = str(tmp_path / "data")
    assert main(again) == 0
    assert folder_bytes(tmp_path / "data") == folder_bytes(out)


def test_second_run_does_nothing(prepared, capsys):
    out, arguments = prepared
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert main(arguments) == 0
    assert "already prepared, nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_other_options_do_not_touch_finished_data(prepared, capsys):
    out, arguments = prepared
    before = folder_bytes(out)
    assert main([*arguments, "--text-key", "body"]) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert folder_bytes(out) == before


def _round_trip(folder, texts):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return ids, [tokenizer.decode(each) for each in ids], tokenizer.eos_token_id, len(tokenizer)


def test_the_tokenizer_folder_loads_offline_and_round_trips(corpus, prepared):
    out, _ = prepared
    texts = [*list(corpus[1].values())[:40], "", " ", "  a  b ", "\r\n\t", "</s><s>", "\0", "   x = 1\n" * 50]
    ids, decoded, eos, length = run_ranks(_round_trip, 1, out / "tokenizer", texts)[0]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer" / "tokenizer.model"))
    assert ids == processor.encode(texts)
    assert decoded == texts
    assert (eos, length) == (read_manifest(out)["eos_id"], read_manifest(out)["vocab_size"])


@pytest.mark.parametrize(
    "content, problem",
    [
        (b'{"text": "a"}\n{"text": \n', "offset 14: broken JSON line"),
        (b'{"text": "a"}\n{"body": "b"}\n', "offset 14: no field 'text'"),
        (b'{"text": "a"}\n{"text": 3}\n', "offset 14: 'text' is int, not a string"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "offset 14: not UTF-8"),
        (b'{"text": "a"}\n{"text": "\\ud800"}\n', "offset 14: 'text' holds a lone surrogate"),
    ],
)
def test_bad_documents_are_named_and_fatal_or_skipped(prepared, tmp_path, capsys, content, problem):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content + b'{"text": ""}\n{"text": "last"}\n')
    arguments = [str(path), "--tokenizer", str(prepared[0] / "tokenizer"), "--out", str(tmp_path / "data")]
    assert main([*arguments, "--validation-fraction", "0"]) == 2
    assert f"{path}, {problem}" in capsys.readouterr().err
    assert not (tmp_path / "data" / "dataset.json").exists()
    assert main([*arguments, "--validation-fraction", "0", "--bad", "skip", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["counts"] == {"documents": 2, "empty": 1, "bad": 1, "duplicates": 0, "text_bytes": 5, "padding_tokens": 0}
    skipped = json.loads((tmp_path / "data" / "skipped.jsonl").read_text())
    assert skipped["offset"] == 14 and skipped["problem"].startswith(problem.removeprefix("offset 14: "))


def test_a_folder_with_other_things_is_left_alone(prepared, tmp_path, capsys):
    (tmp_path / "train_00000.bin").write_text("mine")
    path = tmp_path / "a.txt"
    path.write_text("some text")
    arguments = [str(path), "--tokenizer", str(prepared[0] / "tokenizer"), "--out", str(tmp_path)]
    assert main(arguments) == 2
    assert "holds other files" in capsys.readouterr().err
    assert (tmp_path / "train_00000.bin").read_text() == "mine"


def test_a_second_preparation_of_a_folder_is_refused(prepared, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.2)
    (tmp_path / "a.txt").write_text("some text")
    out = tmp_path / "data"
    with lease.held(out, tmp_path, ".data.lease", "a preparation"):
        assert main([str(tmp_path / "a.txt"), "--tokenizer", str(prepared[0] / "tokenizer"), "--out", str(out)]) == 2
    assert f"error: {out} is in use by a preparation (process " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_mistakes_are_one_message_and_no_traceback(tmp_path):
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "data"), "prepare", "missing", "--train-tokenizer", "400", "--out", "x"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr == ("error: missing: no such file or folder (a dataset of the Hugging Face hub is written hub:NAME)\n")
    assert list(tmp_path.iterdir()) == []


def texts_of(out):
    """Decode the shards: {(split, file, offset): text}."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer" / "tokenizer.model"))
    return {key: processor.decode(ids[:-1]) for key, ids in read_documents(out).items()}


def prepare(prepared, out, *inputs):
    arguments = [*map(str, inputs), "--tokenizer", str(prepared[0] / "tokenizer"), "--out", str(out), "--workers", "1"]
    assert main([*arguments, "--validation-fraction", "0"]) == 0


def test_parquet_datasets_and_zstd_hold_the_same_documents(prepared, tmp_path):
    import datasets
    import pyarrow
    import pyarrow.parquet

    texts = [random_text(np.random.default_rng(i), words=20) for i in range(2500)]
    table = pyarrow.table({"id": range(2500), "text": texts})
    folder = tmp_path / "in"
    folder.mkdir()
    pyarrow.parquet.write_table(table, folder / "rows.parquet", row_group_size=300)
    datasets.Dataset(table).save_to_disk(folder / "dataset")
    with pyarrow.output_stream(folder / "rows.jsonl.zst", compression="zstd") as file:
        file.write("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    hub = folder / "hub"
    hub.mkdir()
    for part in range(5):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[part * 500 : part * 500 + 500]]
        (hub / f"{part}.jsonl").write_text("".join(lines))
    offsets = {
        "rows.parquet": range(2500),
        "dataset": range(2500),
        "rows.jsonl.zst": range(1, 2501),
        "hub": [shard << 40 | row for shard in range(5) for row in range(500)],
    }
    for name, numbers in offsets.items():
        path = f"hub:{folder / name}" if name == "hub" else str(folder / name)
        prepare(prepared, tmp_path / name, path)
        oracle = {("train", path, number): text for number, text in zip(numbers, texts, strict=True)}
        assert texts_of(tmp_path / name) == oracle, name


def test_each_line_is_a_document(prepared, tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("one\n\n  two \r\nthree", newline="")
    prepare(prepared, tmp_path / "data", path, "--each-line")
    oracle = {0: "one", 5: "  two ", 13: "three"}
    assert texts_of(tmp_path / "data") == {("train", str(path), offset): text for offset, text in oracle.items()}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_dedup_keeps_the_first(prepared, tmp_path, workers):
    rng = np.random.default_rng(5)
    texts = [random_text(rng) for _ in range(40)]
    order = rng.integers(0, 40, 200)
    path = tmp_path / "twice.jsonl"
    path.write_text("".join(json.dumps({"text": texts[i]}) + "\n" for i in order))
    prepare(prepared, tmp_path / "data", path, "--dedup", "--workers", workers)
    found = texts_of(tmp_path / "data")
    assert list(found.values()) == [texts[i] for i in dict.fromkeys(order.tolist())]
    counts = read_manifest(tmp_path / "data")["counts"]
    assert (counts["documents"], counts["duplicates"]) == (len(found), 200 - len(found))


def test_best_fit_cuts_few_documents_and_loses_none(prepared, tmp_path):
    rng = np.random.default_rng(3)
    texts = [random_text(rng, words=int(words)) for words in rng.geometric(1 / 40, 600)]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    size = 256
    prepare(prepared, tmp_path / "plain", path)
    prepare(prepared, tmp_path / "packed", path, "--best-fit", str(size))
    oracle = read_documents(tmp_path / "plain")
    manifest = read_manifest(tmp_path / "packed")
    pieces, cut, padding = {}, 0, 0
    for shard in split_shards(manifest, "train"):
        tokens = np.fromfile(tmp_path / "packed" / shard.file, dtype=manifest["dtype"])
        ends = np.fromfile((tmp_path / "packed" / shard.file).with_suffix(".ends"), dtype="<u8").astype(int)
        origins = np.fromfile((tmp_path / "packed" / shard.file).with_suffix(".origins"), dtype=ORIGIN)
        assert len(tokens) % size == 0 and len(tokens) == ends[-1]
        assert set(range(size, len(tokens) + 1, size)) <= set(ends.tolist())  # nothing crosses a sequence
        for ids, origin in zip(np.split(tokens, ends[:-1]), origins, strict=True):
            pieces.setdefault(int(origin["offset"]), []).append(ids.tolist())
    for (_, _, offset), ids in oracle.items():
        mine = sorted(pieces.pop(offset), key=len, reverse=True)  # whole sequences, then the rest
        cut += len(mine) > 1
        assert len(mine) == -(-len(ids) // size)
        last = mine[-1][: len(ids) - size * (len(mine) - 1)]
        padding += len(mine[-1]) - len(last)
        assert sorted([*mine[:-1], last]) == sorted(ids[i : i + size] for i in range(0, len(ids), size))
        assert set(mine[-1][len(last) :]) <= {manifest["eos_id"]}
    assert not pieces and padding == manifest["counts"]["padding_tokens"]
    assert padding / manifest["splits"]["train"]["tokens"] < 0.01
    assert cut == sum(len(ids) > size for ids in oracle.values())  # only those that are too long
    assert "is packed for sequences of 256" in "".join(
        data_problems(tmp_path / "packed", seq_len=128, vocab_size=400, tokenizer=None, needs_validation=False)
    )


def test_a_fast_encoder_that_differs_is_not_used(prepared, tmp_path, monkeypatch, capsys):
    file = str(prepared[0] / "tokenizer" / "tokenizer.json")
    load = encoders.load_encoder

    def wrong(name, tokenizer_file):
        encode = load("tokenizers", tokenizer_file)
        return encode if name == "tokenizers" else lambda texts: encode([text.replace("ri", "ne") for text in texts])

    monkeypatch.setattr(encoders, "load_encoder", wrong)
    name, why = encoders.choose_encoder("auto", file, ["x", "a ri b"])
    assert name == "tokenizers" and why == "fastokens gives other ids for 'a ri b'"
    with pytest.raises(UsageError, match="--encoder fastokens: fastokens gives other ids"):
        encoders.choose_encoder("fastokens", file, ["x", "a ri b"])
    # it was equal on the sample, and differs later: the spot check stops the run
    monkeypatch.setattr(shard_writer, "load_encoder", wrong)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ri"}\n{"text": "tata"}\n')
    monkeypatch.setattr("tools.data.prepare.choose_encoder", lambda *_: ("fastokens", "sampled"))
    arguments = [str(path), "--tokenizer", str(prepared[0] / "tokenizer"), "--out", str(tmp_path / "data")]
    assert main([*arguments, "--workers", "1", "--validation-fraction", "0"]) == 2
    assert f"{path}, offset 0: fastokens and tokenizers give different ids" in capsys.readouterr().err


def test_fastokens_writes_the_same_bytes(corpus, prepared, tmp_path):
    pytest.importorskip("fastokens", reason="the optional fast encoder is not installed")
    written = []
    for name in ("fastokens", "tokenizers"):
        out = tmp_path / name
        prepare(prepared, out, corpus[0], "--encoder", name)
        written.append(folder_bytes(out))
    assert written[0] == written[1]


def test_a_full_disk_is_one_message(prepared, corpus, tmp_path, monkeypatch, capsys):
    def full(self, end, values):
        raise OSError(28, "No space left on device", "shard")

    monkeypatch.setattr(shard_writer.ShardFile, "_write", full)
    arguments = [str(corpus[0]), "--tokenizer", str(prepared[0] / "tokenizer"), "--out", str(tmp_path / "data")]
    assert main([*arguments, "--workers", "1"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "data" / "dataset.json").exists()
