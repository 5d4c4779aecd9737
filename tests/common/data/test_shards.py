"""Reading shards against the whole split in one array, and every problem of a prepared folder."""

import json

import numpy as np
import pytest

from recipes.common.data.shards import CURE, data_problems, open_split, read_manifest, tokenizer_hash
from tests.support.hostile_json import one_message, variants
from tests.support.token_shards import SEQ_LEN, write_data


@pytest.fixture
def prepared(tmp_path):
    return tmp_path / "data", write_data(tmp_path / "data")


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_read_equals_the_concatenated_stream(tmp_path, dtype):
    tokens = write_data(tmp_path / "data", dtype=dtype)["train"]
    stream = open_split(tmp_path / "data", "train", SEQ_LEN)
    assert stream.num_positions == (len(tokens) - 1) // SEQ_LEN
    positions = np.random.default_rng(1).permutation(stream.num_positions)
    read = stream.read(positions)
    assert read.dtype == np.int64 and read.shape == (stream.num_positions, SEQ_LEN + 1)
    for row, position in zip(read, positions, strict=True):
        assert np.array_equal(row, tokens[position * SEQ_LEN : position * SEQ_LEN + SEQ_LEN + 1])
    with pytest.raises(IndexError):
        stream.read(np.array([stream.num_positions]))


def test_a_sequence_may_span_several_shards(tmp_path):
    tokens = write_data(tmp_path / "data", train=(5, 5, 5, 5, 5, 60))["train"]
    stream = open_split(tmp_path / "data", "train", 20)
    assert np.array_equal(stream.read(np.array([0]))[0], tokens[:21])


def problems(folder, **changes):
    settings = {"seq_len": SEQ_LEN, "vocab_size": 1000, "tokenizer": folder / "tokenizer", "needs_validation": True}
    return data_problems(folder, **(settings | changes))


def test_good_data_has_no_problems(prepared):
    assert problems(prepared[0]) == []


def test_every_problem_is_named(prepared):
    folder = prepared[0]
    (folder / "train_00001.bin").unlink()
    with open(folder / "train_00003.bin", "r+b") as file:
        file.truncate(100)
    other = folder.parent / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text('{"model": {"vocab": {"a": 1}}}')
    found = problems(folder, vocab_size=999, tokenizer=other, validation_seqs=22)
    assert len(found) == 5
    for line, parts in zip(
        found,
        [
            (f"data={folder}", "train_00001.bin is missing", CURE),
            (f"data={folder}", "train_00003.bin has 100 bytes, dataset.json says 4000", CURE),
            ("model.vocab_size=999", "1000", "raise model.vocab_size"),
            (f"tokenizer={other}", "not the one", "use "),
            ("batch.seq_len=32", "validation split", "700 tokens", "lower evaluation.seqs"),
        ],
        strict=True,
    ):
        assert all(part in line for part in parts), line
    stream = open_split(folder, "train", SEQ_LEN)
    with pytest.raises(ValueError, match=r"train_00003.bin has 100 bytes"):
        stream.read(np.array([33]))


def test_missing_and_unfinished_preparations(tmp_path):
    assert "does not exist" in problems(tmp_path)[0]
    (tmp_path / "unfinished").mkdir()
    assert "was not finished" in problems(tmp_path)[0]
    (tmp_path / "dataset.json").write_text("[]")
    assert "is not a manifest" in problems(tmp_path)[0]
    (tmp_path / "dataset.json").write_text('{"format": "trifold-tokens", "version": 99}')
    assert "version reads" in problems(tmp_path)[0]


def test_too_short_for_one_sequence(prepared):
    found = problems(prepared[0], seq_len=5000)
    assert len(found) == 2 and "train split" in found[0] and "5001 are needed for 1 sequence;" in found[0]


def test_whatever_dataset_json_and_the_tokenizer_hold_there_is_one_message(tmp_path):
    write_data(tmp_path)
    kept = (tmp_path / "dataset.json").read_bytes()
    for raw in variants(json.loads(kept), 200):
        (tmp_path / "dataset.json").write_bytes(raw)
        lines = data_problems(tmp_path, seq_len=16, vocab_size=64, tokenizer=None, needs_validation=True)
        assert all(str(tmp_path) in line or "batch.seq_len" in line or "vocab_size" in line for line in lines)
        try:
            open_split(tmp_path, "train", 16)
        except (ValueError, OSError) as error:
            assert str(tmp_path) in one_message(error)
    (tmp_path / "dataset.json").write_bytes(kept)
    for raw in variants({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"], "c d"]}, "padding": None}, 100):
        (tmp_path / "tokenizer.json").write_bytes(raw)
        try:
            assert tokenizer_hash(tmp_path).startswith("sha256:")
        except ValueError as error:
            assert str(tmp_path) in one_message(error)


@pytest.mark.parametrize("file", ["../train_00000.bin", "/etc/passwd", "a/../../b.bin"])
def test_a_manifest_leads_to_shards_in_its_folder_alone(tmp_path, file):
    write_data(tmp_path)
    manifest = json.loads((tmp_path / "dataset.json").read_text())
    manifest["splits"]["train"]["shards"][0]["file"] = file
    (tmp_path / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="leads out of the folder"):
        read_manifest(tmp_path)
