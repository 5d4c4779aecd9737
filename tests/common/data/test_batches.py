"""The micro batches of every layout, read ahead or not, against the whole split in one array."""

import numpy as np
import pytest
import torch

from recipes.common.data.batches import step_micro_batches, validation_micro_batches
from recipes.common.data.order import sequence_position
from recipes.common.data.prefetcher import Prefetcher
from recipes.common.data.shards import open_split
from tests.support.token_shards import SEQ_LEN, write_data


@pytest.fixture
def prepared(tmp_path):
    return tmp_path / "data", write_data(tmp_path / "data")


def next_step(consumed, global_seqs):
    """A guess that a ramp or a resume makes wrong."""
    return consumed + global_seqs, global_seqs


def run_stream(stream, *, consumed, until, data_size, ramp, ahead):
    """Return the sequences of a run from `consumed` to `until`, in the order of the steps: int64 [until - consumed, S + 1]."""
    readers = []
    for rank in range(data_size):

        def read(at, seqs, rank=rank):
            return step_micro_batches(
                stream, seed=3, consumed=at, global_seqs=seqs, micro_seqs=2, data_rank=rank, data_size=data_size
            )

        readers.append(Prefetcher(read, next_step) if ahead else read)
    rows = []
    while consumed < until:
        seqs = 40 if ramp and consumed < 2400 else 80
        ranks = [reader.next(consumed, seqs) if ahead else reader(consumed, seqs) for reader in readers]
        for micro in zip(*ranks, strict=True):
            rows += micro
        consumed += seqs
    for reader in readers if ahead else ():
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


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("ramp", [False, True])
@pytest.mark.parametrize("data_size", [1, 2, 4])
def test_same_sequences_in_every_layout(long_run, data_size, ramp, ahead):
    stream, tokens = long_run
    found = run_stream(stream, consumed=0, until=10_000, data_size=data_size, ramp=ramp, ahead=ahead)
    assert np.array_equal(found.numpy(), tokens)
    other = {1: 4, 2: 1, 4: 2}[data_size]
    resumed = run_stream(stream, consumed=4800, until=10_000, data_size=other, ramp=False, ahead=ahead)
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
    assert {len(rank) for rank in ranks} == {-(-seqs // (2 * data_size))}
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

    prefetch = Prefetcher(read, next_step)
    with pytest.raises(OSError, match="gone"):
        prefetch.next(0, 4)
    prefetch.close()
