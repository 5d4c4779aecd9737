"""Over a change of order each source of a blend goes on with what it has not given, at its share, and skips stay skipped."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from recipes.common.checkpoint.position import RunPosition, written_position
from recipes.common.checkpoint.reorder import carry_over, first_order
from recipes.common.data.batches import open_train
from recipes.common.data.order import kept_index
from recipes.common.recipe import Batch, Blend
from recipes.common.run_dir.run_files import recipe_to_dict
from tests.support.tiny import tiny_recipe, write_shards

TOKENS = 8_000


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(("first", "second", "third")):
        write_shards(root / name, seed=seed, tokens=TOKENS)
    return [str(root / name) for name in ("first", "second", "third")]


def batch(seq_len):
    return Batch(seq_len=seq_len, micro_seqs=1, global_seqs=4)


def read(recipe, position, count):
    """(source, token) of the next `count` sequences, each a set, in order."""
    stream = open_train(recipe.data, recipe.batch.seq_len, position.order)
    index = kept_index(position.consumed_seqs + np.arange(count), position.skips)
    sources, places = stream.locate(recipe.seed, index)
    seq_len = recipe.batch.seq_len
    names = stream.names if hasattr(stream, "names") else [recipe.data]
    return [
        {(names[s], t) for t in range(p * seq_len, (p + 1) * seq_len)}
        for s, p in zip(sources.tolist(), places.tolist(), strict=True)
    ]


def test_a_blend_goes_on_with_another_seq_len_and_other_weights(folders):
    first, second, third = folders
    before = tiny_recipe(Path(first), data=Blend(weights={first: 3, second: 1}), batch=batch(16))
    position = RunPosition(step=40, consumed_seqs=160, order=first_order(before))
    given = set().union(*read(before, replace(position, consumed_seqs=0), 160))
    after = replace(before, data=Blend(weights={second: 1, third: 1}), batch=batch(40))
    carried = carry_over(position, after, recipe_to_dict(before))
    assert carried.consumed_tokens(40) == position.consumed_tokens(16) == 2560
    assert (carried.order.since_step, carried.consumed_seqs, carried.order.rest_tokens) == (40, 64, 0)
    ahead = read(after, carried, 200)
    assert not given & set().union(*ahead)
    assert sum(len(tokens) for tokens in ahead) == len(set().union(*ahead))  # nor twice
    assert sum(next(iter(tokens))[0] == third for tokens in ahead) == 100


def test_what_changes_nothing_of_the_order_leaves_the_position(folders):
    recipe = tiny_recipe(Path(folders[0]), batch=batch(16))
    position = RunPosition(step=3, consumed_seqs=12, skips=((20, 24),), order=first_order(recipe))
    assert carry_over(position, replace(recipe, steps=99, name="b"), recipe_to_dict(recipe)) == position


def test_skips_ahead_are_left_out_in_the_new_order_too(folders):
    recipe = tiny_recipe(Path(folders[0]), batch=batch(16))
    position = RunPosition(step=5, consumed_seqs=20, skips=((4, 8), (30, 40)), order=first_order(recipe))
    suspect = set().union(*read(recipe, replace(position, consumed_seqs=30, skips=()), 10))
    after = replace(recipe, batch=batch(24))
    carried = carry_over(position, after, recipe_to_dict(recipe))
    assert carried.skips == ()
    assert carried.consumed_tokens(24) == 320
    done = set().union(*read(recipe, replace(position, consumed_seqs=0), 20))
    ahead = set().union(*read(after, carried, 250))
    assert not ahead & (suspect | done)


def test_two_changes_and_what_a_checkpoint_keeps_of_them(folders):
    recipe = tiny_recipe(Path(folders[0]), batch=batch(16))
    position, seen = RunPosition(order=first_order(recipe)), set()
    for seq_len, seed in ((32, 1234), (32, 7), (16, 7)):
        tokens = read(recipe, position, 40)
        assert not seen & set().union(*tokens)
        seen |= set().union(*tokens)
        position = replace(position, step=position.step + 10, consumed_seqs=position.consumed_seqs + 40)
        after = replace(recipe, batch=batch(seq_len), seed=seed)
        position = carry_over(position, after, recipe_to_dict(recipe))
        recipe = after
    state = json.loads(json.dumps({**asdict(position), "skips": list(position.skips)}))
    assert written_position(state) == position
    assert not seen & set().union(*read(recipe, position, 60))


def test_data_prepared_again_goes_on_by_its_tokens(folders, tmp_path):
    write_shards(tmp_path / "data", seed=9, tokens=TOKENS)
    recipe = tiny_recipe(tmp_path / "data", batch=batch(16))
    position = RunPosition(step=10, consumed_seqs=40, order=first_order(recipe))
    written = recipe_to_dict(recipe)
    manifest = tmp_path / "data" / "dataset.json"
    manifest.write_text(manifest.read_text().replace('"documents": 1', '"documents": 2', 1))
    carried = carry_over(position, recipe, written)
    assert read(recipe, carried, 4) == read(recipe, position, 4)
    assert carried.order.readings[str(tmp_path / "data")].given == 40
