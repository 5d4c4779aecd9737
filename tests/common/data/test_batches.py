"""Packed reading against an oracle: the whole split in one array, cut by hand."""

import hashlib
import json

import numpy as np
import pytest
import torch

from recipes.common.data.batches import (
    Prefetcher,
    data_problems,
    document_positions,
    masking_problem,
    open_split,
    step_micro_batches,
    validation_micro_batches,
)
from recipes.common.data.order import sequence_position
from recipes.common.data.shards import CURE, FORMAT, ORIGIN, VERSION, tokenizer_hash

SEQ_LEN = 32


def write_split(folder, split, shard_tokens, dtype, rng):
    """Shards of random tokens: (manifest entry, all tokens in one array)."""
    shards, parts = [], []
    for number, count in enumerate(shard_tokens):
        tokens = rng.integers(0, 1000, count).astype(dtype)
        ends = np.unique(np.append(rng.integers(1, count, min(count - 1, 5)), count)).astype("<u8")
        name = f"{split}_{number:05d}"
        values = {"bin": tokens, "ends": ends, "origins": np.zeros(len(ends), ORIGIN)}
        checksums = {}
        for end, array in values.items():
            (folder / f"{name}.{end}").write_bytes(array.tobytes())
            checksums[f"{name}.{end}"] = "sha256:" + hashlib.sha256(array.tobytes()).hexdigest()
        shards.append({"file": f"{name}.bin", "tokens": count, "documents": len(ends), "checksums": checksums})
        parts.append(tokens)
    entry = {"tokens": sum(shard_tokens), "documents": sum(shard["documents"] for shard in shards), "shards": shards}
    return entry, np.concatenate(parts).astype(np.int64)


def write_data(folder, *, train=(1000, 7, 20, 2000, 333), validation=(500, 200), dtype="uint16"):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text('{"model": {"vocab": {}}, "padding": null}')
    splits, oracle = {}, {}
    for split, shard_tokens in (("train", train), ("validation", validation)):
        splits[split], oracle[split] = write_split(folder, split, shard_tokens, dtype, rng)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer_hash": tokenizer_hash(folder / "tokenizer"),
        "vocab_size": 1000,
        "eos_id": 2,
        "dtype": dtype,
        "splits": splits,
    }
    (folder / "dataset.json").write_text(json.dumps(manifest))
    return oracle


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


def run_stream(stream, *, consumed, until, data_size, ramp, workers):
    """The sequences of a run from `consumed` to `until`, in the order of the steps: int64 [until - consumed, S + 1]."""
    readers = []
    for rank in range(data_size):

        def read(at, seqs, rank=rank):
            return step_micro_batches(
                stream, seed=3, consumed=at, global_seqs=seqs, micro_seqs=2, data_rank=rank, data_size=data_size
            )

        readers.append(Prefetcher(read, workers=workers))
    rows = []
    while consumed < until:
        seqs = 40 if ramp and consumed < 2400 else 80
        ranks = [reader.next(consumed, seqs) for reader in readers]
        for micro in zip(*ranks, strict=True):
            rows += micro
        consumed += seqs
    for reader in readers:
        reader.close()
    return torch.cat(rows)


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """A stream, and the first 10,000 sequences of a run with seed 3: nearly three epochs of it."""
    folder = tmp_path_factory.mktemp("long") / "data"
    tokens = write_data(folder, train=(30_000, 70_001, 25_000))["train"]
    stream = open_split(folder, "train", SEQ_LEN)
    positions = sequence_position(3, np.arange(10_000), stream.num_positions)
    assert 2 < 10_000 / stream.num_positions < 3
    return stream, np.stack([tokens[p * SEQ_LEN : p * SEQ_LEN + SEQ_LEN + 1] for p in positions])


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("ramp", [False, True])
@pytest.mark.parametrize("data_size", [1, 2, 4])
def test_same_sequences_in_every_layout(long_run, data_size, ramp, workers):
    stream, tokens = long_run
    found = run_stream(stream, consumed=0, until=10_000, data_size=data_size, ramp=ramp, workers=workers)
    assert np.array_equal(found.numpy(), tokens)
    other = {1: 4, 2: 1, 4: 2}[data_size]
    resumed = run_stream(stream, consumed=4800, until=10_000, data_size=other, ramp=False, workers=workers)
    assert np.array_equal(resumed.numpy(), tokens[4800:])


def test_micro_batches_must_divide(prepared):
    stream = open_split(prepared[0], "train", SEQ_LEN)
    with pytest.raises(ValueError, match="global_seqs=6 is not a multiple of micro_seqs=2 x data parallel 2"):
        step_micro_batches(stream, seed=1, consumed=0, global_seqs=6, micro_seqs=2, data_rank=0, data_size=2)


@pytest.mark.parametrize("data_size", [1, 2, 3])
@pytest.mark.parametrize("seqs", [1, 7, 12, 21])
def test_each_validation_sequence_counts_once(prepared, seqs, data_size):
    folder, oracle = prepared
    stream = open_split(folder, "validation", SEQ_LEN)
    ranks = [
        validation_micro_batches(stream, seqs=seqs, micro_seqs=2, data_rank=rank, data_size=data_size)
        for rank in range(data_size)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    found = []
    for micro in zip(*ranks, strict=True):
        for tokens, valid in micro:
            assert tokens.shape == (2, SEQ_LEN + 1) and valid.dtype == torch.bool
            found += tokens[valid].tolist()
    tokens = oracle["validation"]
    assert found == [tokens[p * SEQ_LEN : p * SEQ_LEN + SEQ_LEN + 1].tolist() for p in range(seqs)]


def test_more_validation_than_there_is(prepared):
    stream = open_split(prepared[0], "validation", SEQ_LEN)
    with pytest.raises(ValueError, match=r"evaluation.seqs=22 is not in \[1, 21\]"):
        validation_micro_batches(stream, seqs=22, micro_seqs=2, data_rank=0, data_size=1)


def test_a_read_error_reaches_the_step():
    def read(consumed, global_seqs):
        raise OSError("gone")

    prefetch = Prefetcher(read, workers=2)
    with pytest.raises(OSError, match="gone"):
        prefetch.next(0, 4)
    prefetch.close()


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
            (f"data={folder}", "train_00003.bin has 100 bytes, the manifest says 4000", CURE),
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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masked_documents_do_not_see_each_other(attention):
    """One packed row gives the logits that each document gives alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        attn_implementation=attention,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    lengths = [5, 1, 1, 9, 16]
    documents = [torch.cat([torch.randint(3, 64, (length - 1,)), torch.tensor([2])]) for length in lengths]
    tokens = torch.stack([torch.cat(documents), torch.cat(documents[::-1])])
    positions = document_positions(tokens, 2)
    assert positions[0].tolist() == [i for length in lengths for i in range(length)]
    packed = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    for row, order in enumerate((documents, documents[::-1])):
        alone = [model(input_ids=document[None], use_cache=False).logits[0] for document in order]
        torch.testing.assert_close(packed[row], torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_attention_that_cannot_mask_is_refused_by_name():
    assert masking_problem("sdpa", 8) is None and masking_problem("flash_attention_2", 1) is None
    assert "attention=paged cannot keep documents apart" in masking_problem("paged", 1)
    assert "batch.micro_seqs=2: attention=flash_attention_2" in masking_problem("flash_attention_2", 2)
