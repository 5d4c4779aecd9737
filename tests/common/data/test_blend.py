"""Blends, curricula and skips against oracles that count one sequence after another."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from recipes.common.data.batches import open_train, open_validation, recipe_data_problems, step_micro_batches
from recipes.common.data.blend import blend_problems, fair_pattern, open_blend, shares
from recipes.common.data.order import kept_index, merge_skips, sequence_position
from recipes.common.data.shards import TokenStream, open_split
from recipes.common.recipe import Blend
from tests.support.token_shards import SEQ_LEN, write_data

WEIGHTS = {"web": 0.7, "code": 0.25, "math": 0.05}
SIZES = {"web": (4000, 300), "code": (1500,), "math": (700, 5)}


@pytest.fixture
def sources(tmp_path):
    return {name: tmp_path / name for name in SIZES}, {
        name: write_data(tmp_path / name, train=size)["train"] for name, size in SIZES.items()
    }


def at(paths, weights):
    """The weights of the folders themselves."""
    return {str(paths[name]): weight for name, weight in weights.items()}


@pytest.mark.parametrize("counts", [[1], [1, 1], [7, 2, 1], [14, 5, 1], [0, 3, 0, 4], [997, 2, 1], [1] * 50])
def test_every_source_is_within_one_of_its_share(counts):
    pattern = fair_pattern(counts)
    assert np.bincount(pattern, minlength=len(counts)).tolist() == counts
    for source, count in enumerate(counts):
        given = np.cumsum(np.append(pattern, pattern) == source)
        ideal = np.arange(1, 2 * len(pattern) + 1) * count / len(pattern)
        assert np.abs(given - ideal).max() < 1


def test_proportions_hold_over_any_window(sources):
    stream = open_blend(Blend(weights=at(sources[0], WEIGHTS)), SEQ_LEN)
    source, _ = stream.locate(1, np.arange(5000) + 10**9)
    for start, stop in ((0, 5000), (17, 117), (1234, 4321)):
        counts = np.bincount(source[start:stop], minlength=3)
        assert np.abs(counts - (stop - start) * np.array([0.7, 0.25, 0.05])).max() < 2


def test_a_blend_reads_each_source_in_its_own_order(sources):
    paths, tokens = sources
    stream = open_blend(Blend(weights=at(paths, WEIGHTS)), SEQ_LEN)
    source, position = stream.locate(9, np.arange(800))
    rows = stream.read_sequences(9, np.arange(800))
    for number, name in enumerate(WEIGHTS):
        mine = position[source == number]
        count = stream.streams[number].num_positions
        for epoch in range(len(mine) // count):
            assert sorted(mine[epoch * count : (epoch + 1) * count]) == list(range(count))
        for row, p in zip(rows[source == number], mine, strict=True):
            assert np.array_equal(row, tokens[name][p * SEQ_LEN : p * SEQ_LEN + SEQ_LEN + 1])
    assert stream.epochs(800) == {
        str(paths[name]): (source == number).sum() / stream.streams[number].num_positions for number, name in enumerate(WEIGHTS)
    }


def test_one_source_reads_as_without_a_blend(sources):
    paths, _ = sources
    alone = open_split(paths["web"], "train", SEQ_LEN)
    blend = open_blend(Blend(weights=at(paths, {"web": 3})), SEQ_LEN)
    index = np.arange(300)
    assert np.array_equal(blend.read_sequences(5, index), alone.read_sequences(5, index))


def test_a_change_goes_on_where_each_source_was(sources):
    """The past stays, no source repeats before its epoch ends, and the new shares hold from the first sequence."""
    paths, _ = sources
    before = Blend(weights=at(paths, WEIGHTS))
    after = replace(before, changes=((333 * SEQ_LEN, at(paths, {"code": 0.5, "math": 0.5})),))
    old, new = (open_blend(blend, SEQ_LEN) for blend in (before, after))
    index = np.arange(1000)
    assert np.array_equal(old.locate(2, index[:333]), new.locate(2, index[:333]))
    source, position = new.locate(2, index)
    assert np.bincount(source[333:], minlength=3).tolist() in ([0, 333, 334], [0, 334, 333])
    for number in range(3):
        mine, count = position[source == number], new.streams[number].num_positions
        for start in range(0, len(mine) // count * count, count):
            assert sorted(mine[start : start + count]) == list(range(count))


def test_a_recipe_names_a_folder_or_a_blend(sources):
    paths, _ = sources
    checks = {"seq_len": SEQ_LEN, "vocab_size": 1000, "tokenizer": None, "needs_validation": True}
    web, weights = str(paths["web"]), at(paths, WEIGHTS)
    assert recipe_data_problems(web, **checks) == []
    assert recipe_data_problems(Blend(weights=weights), **checks) == []
    (paths["code"] / "train_00000.bin").unlink()
    found = recipe_data_problems(Blend(weights=weights | {str(paths["math"]): -1}), **checks)
    assert len(found) == 2 and "data.weights" in found[0] and "train_00000.bin is missing" in found[1]
    assert isinstance(open_train(web, SEQ_LEN), TokenStream)
    assert open_train(Blend(weights=weights), SEQ_LEN).names == list(weights)
    assert {name: stream.split for name, stream in open_validation(Blend(weights=weights), SEQ_LEN).items()} == (
        dict.fromkeys(weights, "validation")
    )


def test_weights_are_the_decimals_that_were_written():
    assert shares({"a": 0.1, "b": 0.2}) == {"a": Fraction(1, 3), "b": Fraction(2, 3)}


def test_blend_problems_are_all_named():
    blend = Blend(
        weights={"a": -1.0, "b": 2.0},
        changes=((SEQ_LEN * 10, {"a": 0.0}), (SEQ_LEN * 5, {"a": 1}), (SEQ_LEN * 20 + 1, {"a": 0.123456789, "b": 1})),
    )
    found = blend_problems(blend, SEQ_LEN)
    assert len(found) == 5
    assert "at least 0" in found[0] and "not all 0" in found[1] and f"must be over {SEQ_LEN * 10}" in found[2]
    assert "common denominator" in found[3] and "multiple of batch.seq_len=32" in found[4]
    assert blend_problems(Blend(weights=WEIGHTS), SEQ_LEN) == []


@pytest.mark.parametrize("skips", [(), ((0, 3),), ((5, 9), (20, 21)), ((20, 30), (5, 9), (8, 12), (12, 13))])
def test_skips_leave_out_exactly_their_ranges(skips):
    left_out = {i for start, stop in skips for i in range(start, stop)}
    oracle = [i for i in range(200) if i not in left_out]
    assert kept_index(np.arange(len(oracle)), skips).tolist() == oracle
    assert kept_index(np.arange(4), merge_skips(skips)).tolist() == oracle[:4]


def test_a_skip_is_no_range():
    with pytest.raises(ValueError, match=r"skip \(5, 5\)"):
        kept_index(np.arange(3), ((5, 5),))


def test_rewind_and_skip_in_another_layout(sources):
    """Back to sequence 64, leave out [80, 112): the past is the same, the rest follows without them, at any dp."""
    paths, _ = sources
    stream = open_split(paths["web"], "train", SEQ_LEN)
    index = [i for i in range(128) if not 80 <= i < 112]
    wanted = stream.read(sequence_position(3, np.array(index), stream.num_positions))
    for data_size in (1, 2, 4):
        found = []
        for consumed in range(0, 96, 16):
            ranks = [
                step_micro_batches(
                    stream, seed=3, consumed=consumed, global_seqs=16, micro_seqs=2, data_rank=rank,
                    data_size=data_size, skips=((80, 112),),
                )
                for rank in range(data_size)
            ]  # fmt: skip
            found += [micro.numpy() for step in zip(*ranks, strict=True) for micro in step]
        assert np.array_equal(np.concatenate(found), wanted)
