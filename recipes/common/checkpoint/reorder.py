"""Carries a run's position over a change of batch.seq_len, the seed or the data: in tokens, without repeats in an epoch.

A source that goes on unchanged goes on where it was. One with another order first gives what its epoch has left
(recipes.common.data.reading). One whose folder was prepared again goes on by its number of tokens, whatever they are now.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from recipes.common.checkpoint.position import RunPosition
from recipes.common.data.blend import data_folders, data_from_json, folders, given_until, plan_phases, shares, source_seed
from recipes.common.data.reading import Order, PastOrder, Reading, SourceOrder
from recipes.common.data.shards import data_identity, open_split
from recipes.common.recipe import Blend, Recipe, from_root


def first_order(recipe: Recipe) -> Order:
    """Return the order of a fresh run: it says which data are read."""
    return Order(readings={name: Reading(identity=data_identity(from_root(name))) for name in data_folders(recipe)})


def carry_over(position: RunPosition, recipe: Recipe, written: Mapping[str, Any] | None) -> RunPosition:
    """Return the position in the order of `recipe`. written: the recipe.json of the checkpoint; None where it has none.

    Equal to `position` where nothing changed that the order depends on.
    """
    fresh = first_order(recipe)
    if written is None:
        return replace(position, order=fresh)
    before = _Before(position, written)
    if before.blend == _blend(recipe.data) and (before.seq_len, before.seed) == (recipe.batch.seq_len, recipe.seed):
        pairs = list(zip(before.names, fresh.readings.items(), strict=True))
        if all(before.same_data(old, reading.identity) for old, (_, reading) in pairs):
            readings = {name: replace(before.reading(old), identity=reading.identity) for old, (name, reading) in pairs}
            return replace(position, order=replace(position.order, readings=readings))
    tokens = position.consumed_tokens(before.seq_len)
    start, rest = divmod(tokens, recipe.batch.seq_len)
    readings = {name: before.carry(name, number, recipe) for number, name in enumerate(fresh.readings)}
    order = Order(since_step=position.step, start_seqs=start, rest_tokens=rest, readings=readings)
    return replace(position, consumed_seqs=start, skips=(), order=order)


class _Before:
    """What the checkpoint's run had read, source by source."""

    def __init__(self, position: RunPosition, written: Mapping[str, Any]) -> None:
        self.seq_len, self.seed = written["batch"]["seq_len"], written["seed"]
        self._data = data_from_json(written["data"])
        self.blend = _blend(self._data)
        self.names = folders(self._data) if isinstance(self._data, Blend) else [self._data]
        self._order = position.order
        here = position.next_index()
        # of the sequences: those read or skipped, then those to be skipped
        self._ranges = [(self._order.start_seqs, here), *((max(a, here), b) for a, b in position.skips if b > here)]

    def reading(self, name: str) -> Reading:
        return self._order.readings.get(name, Reading())

    def same_data(self, name: str, identity: str) -> bool:
        return self.reading(name).identity in ("", identity)

    def carry(self, name: str, number: int, recipe: Recipe) -> Reading:
        """Return where the source `name`, the `number`-th of the recipe, goes on."""
        identity, seq_len = data_identity(from_root(name)), recipe.batch.seq_len
        alike = [old for old in self.names if self.reading(old).identity == identity]
        alike = alike or [old for old in self.names if old == name]
        if not alike:
            return Reading(identity=identity)  # nothing of it was read
        old = name if name in alike else alike[0]
        (_, read), *ahead = self._numbers(old)
        given = self.reading(old).given + read
        if not self.same_data(old, identity):
            return Reading(identity=identity, given=given * self.seq_len // seq_len)
        seed = source_seed(self.seed, self.names.index(old))
        if (seed, self.seq_len) == (source_seed(recipe.seed, number), seq_len) and not ahead:
            return replace(self.reading(old), identity=identity, given=given)
        return self._left(old, identity, seed, name)

    def _left(self, old: str, identity: str, seed: int, name: str) -> Reading:
        """Return the beginning of another order in what the epoch has left."""
        reading = self.reading(old)
        count = open_split(from_root(name), "train", self.seq_len).num_positions
        order = SourceOrder(count, self.seq_len, reading)
        (_, given), *ahead = self._numbers(old)
        epoch, read = divmod(_index(order, seed, given), count)
        ranges = [(0, read)]
        for start, stop in ahead:
            if start < stop:
                low, high = (_index(order, seed, at) - epoch * count for at in (start, stop))
                ranges.append((min(low, count), min(high, count)))
        past = PastOrder(
            seed=seed, seq_len=self.seq_len, num_positions=count, epoch=epoch, ranges=tuple(r for r in ranges if r[0] < r[1])
        )
        kept = reading.past if epoch == reading.epoch else ()
        return Reading(identity=identity, epoch=epoch, past=(*kept, past) if past.ranges else kept)

    def _numbers(self, name: str) -> list[tuple[int, int]]:
        """Return which of a source's sequences, by number since its order began, lie in each of the ranges."""
        start = self._order.start_seqs
        if not isinstance(self._data, Blend):
            return [(first - start, stop - start) for first, stop in self._ranges]
        phases, source = plan_phases(self._data, self.seq_len), self.names.index(name)
        before = given_until(phases, start)[source]
        return [tuple(int(given_until(phases, at)[source] - before) for at in bounds) for bounds in self._ranges]


def _index(order: SourceOrder, seed: int, number: int) -> int:
    """Return the index of a source's sequence; where it is the first of an epoch, that of the epoch."""
    return int(order.index(seed, np.array([number]))[0])


def _blend(data: str | Blend) -> list[Any]:
    """Return what a blend's order depends on but for the folders themselves: the shares, in the order of the folders."""
    if not isinstance(data, Blend):
        return [(0, [1])]
    names = folders(data)
    phases = ((0, data.weights), *data.changes)
    return [(after, [shares(weights).get(name, 0) for name in names]) for after, weights in phases]
