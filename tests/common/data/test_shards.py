"""Reading shards against the whole split in one array, and every problem of a prepared folder."""

import numpy as np
import pytest

from recipes.common.data.shards import CURE, data_problems, open_split
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
