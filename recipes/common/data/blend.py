"""Reads several prepared folders as one stream, by weights that may change at stated tokens.

Which source a sequence comes from, and which of its sequences it is, are pure functions of the sequence's index: a
fair schedule over the weights' common denominator (Baruah et al. 1996, "Proportionate progress") keeps every source
within one sequence of its share at every moment. A change of weights leaves everything before it as it was.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import Any

import numpy as np

from recipes.common.data.order import GOLDEN, MASK_64
from recipes.common.data.reading import NOTHING_READ, UNCHANGED, Order
from recipes.common.data.shards import TokenStream, open_split
from recipes.common.recipe import Blend, Recipe, from_root

BLEND_VERSION = 1  # of the schedule over the sources: a run's record holds it; a test holds what it stands for
MAX_PERIOD = 100_000  # of the schedule: its table is made at the start, about a microsecond an entry


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A span of sequences with constant weights. The pattern repeats every `len(source_of)` sequences."""

    start: int  # index of its first sequence
    source_of: np.ndarray  # int64 [period]: which source each slot reads
    nth: np.ndarray  # int64 [period]: how many slots of that source came before in the pattern
    counts: np.ndarray  # int64 [sources]: slots in one period
    before: np.ndarray  # int64 [sources]: sequences each source gave before this phase


def folders(blend: Blend) -> list[str]:
    """Return every source, in the order they are first named."""
    names = list(blend.weights)
    for _, weights in blend.changes:
        names += [name for name in weights if name not in names]
    return names


def blend_problems(blend: Blend, seq_len: int) -> list[str]:
    """Return what is wrong with the weights themselves, one line each."""
    problems = []
    previous = -1
    for number, (after_tokens, weights) in enumerate(((0, blend.weights), *blend.changes)):
        where = f"data.changes[{after_tokens}]" if number else "data.weights"
        if any(not weight >= 0 for weight in weights.values()) or not sum(weights.values()) > 0:
            problems.append(f"{where}={weights}: weights must be at least 0 and not all 0")
        elif (period := lcm(*(share.denominator for share in shares(weights).values()))) > MAX_PERIOD:
            problems.append(
                f"{where}={weights}: the shares have common denominator {period}, over {MAX_PERIOD}; round the weights"
            )
        if after_tokens % seq_len or after_tokens <= previous:
            problems.append(
                f"data.changes: after_tokens={after_tokens} must be over {previous} and a multiple of batch.seq_len={seq_len}"
            )
        previous = after_tokens
    return problems


def shares(weights: dict[str, float]) -> dict[str, Fraction]:
    """Return exact shares: a weight means the decimal number that was written (0.1 is one tenth)."""
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    total = sum(exact.values())
    return {name: weight / total for name, weight in exact.items()}


def fair_pattern(counts: list[int]) -> np.ndarray:
    """Return the source that each slot of one period reads, `counts[k]` slots for source k: int64 [sum(counts)].

    After n slots source k has had floor(n * share) to ceil(n * share) of them, or one more or fewer: earliest deadline first
    over the windows [floor(j / share), ceil((j + 1) / share)) of its j-th slot.
    """
    period = sum(counts)
    release, deadline, source = [], [], []
    for number, count in enumerate(counts):
        nth = np.arange(count, dtype=np.int64)
        release.append(nth * period // max(count, 1))
        deadline.append(-(-(nth + 1) * period // max(count, 1)))
        source.append(np.full(count, number, dtype=np.int64))
    order = np.argsort(np.concatenate(release), kind="stable")
    jobs = [np.concatenate(column)[order].tolist() for column in (release, deadline, source)]
    pattern, waiting, at = np.empty(period, dtype=np.int64), [], 0
    for slot in range(period):
        while at < period and jobs[0][at] <= slot:
            heapq.heappush(waiting, (jobs[1][at], jobs[2][at]))
            at += 1
        pattern[slot] = heapq.heappop(waiting)[1]
    return pattern


def plan_phases(blend: Blend, seq_len: int) -> list[Phase]:
    """Return the phases of a blend that `blend_problems` has accepted."""
    names = folders(blend)
    phases: list[Phase] = []
    for after_tokens, weights in ((0, blend.weights), *blend.changes):
        exact = shares(weights)
        period = lcm(*(share.denominator for share in exact.values()))
        counts = [int(exact.get(name, Fraction(0)) * period) for name in names]
        pattern = fair_pattern(counts)
        nth = np.zeros(period, dtype=np.int64)
        for number, count in enumerate(counts):
            nth[pattern == number] = np.arange(count)
        start = after_tokens // seq_len
        before = given(phases[-1], start - phases[-1].start) if phases else np.zeros(len(names), dtype=np.int64)
        phases.append(Phase(start=start, source_of=pattern, nth=nth, counts=np.array(counts, dtype=np.int64), before=before))
    return phases


def given(phase: Phase, sequences: int) -> np.ndarray:
    """Count the sequences that each source has given when a phase is `sequences` long: int64 [sources]."""
    cycles, rest = divmod(sequences, len(phase.source_of))
    return phase.before + cycles * phase.counts + np.bincount(phase.source_of[:rest], minlength=len(phase.counts))


def given_until(phases: list[Phase], sequences: int) -> np.ndarray:
    """Count the sequences that each source gives in the first `sequences` of a run: int64 [sources]."""
    phase = [phase for phase in phases if phase.start <= sequences][-1]
    return given(phase, sequences - phase.start)


def source_seed(seed: int, source: int) -> int:
    """Return the seed of a source's own order, by its number; source 0 alone reads as it does without a blend."""
    return (seed + source * GOLDEN) & MASK_64


class BlendedStream:
    """The train splits of a blend, read like a TokenStream, by sequence index only."""

    def __init__(self, names: list[str], streams: list[TokenStream], phases: list[Phase], start_seqs: int = 0) -> None:
        """start_seqs: where the present order begins (recipes.common.data.reading.Order)."""
        self.names, self.streams, self.phases = names, streams, phases
        self.seq_len = streams[0].seq_len
        self._starts = np.array([phase.start for phase in phases])
        self._start_seqs, self._before = start_seqs, given_until(phases, start_seqs)

    def locate(self, seed: int, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (source, position in its stream) of sequences by index: int64 [k] each."""
        index = np.atleast_1d(np.asarray(index, dtype=np.int64))
        sources, positions = np.empty_like(index), np.empty_like(index)
        phase_of = np.searchsorted(self._starts, index, side="right") - 1
        for number in np.unique(phase_of).tolist():
            phase, rows = self.phases[number], np.flatnonzero(phase_of == number)
            cycle, slot = np.divmod(index[rows] - phase.start, len(phase.source_of))
            sources[rows] = phase.source_of[slot]
            positions[rows] = phase.before[sources[rows]] + cycle * phase.counts[sources[rows]] + phase.nth[slot]
        for source in np.unique(sources).tolist():
            rows = np.flatnonzero(sources == source)
            numbers = positions[rows] - self._before[source]
            positions[rows] = self.streams[source].order.positions(source_seed(seed, source), numbers)
        return sources, positions

    def read_sequences(self, seed: int, index: np.ndarray) -> np.ndarray:
        """Read the sequences `index` of a run: int64 [k, seq_len + 1]."""
        sources, positions = self.locate(seed, index)
        out = np.empty((len(sources), self.seq_len + 1), dtype=np.int64)
        for source in np.unique(sources).tolist():
            rows = np.flatnonzero(sources == source)
            out[rows] = self.streams[source].read(positions[rows])
        return out

    def epochs(self, sequences: int) -> dict[str, float]:
        """Return how often each source is read in a run of `sequences`."""
        counts = given_until(self.phases, sequences)
        return {
            name: int(count) / stream.num_positions for name, count, stream in zip(self.names, counts, self.streams, strict=True)
        }


def open_blend(blend: Blend, seq_len: int, order: Order = UNCHANGED) -> BlendedStream:
    """Open the train splits of a blend."""
    names = folders(blend)
    streams = [open_split(from_root(name), "train", seq_len, reading=order.readings.get(name, NOTHING_READ)) for name in names]
    return BlendedStream(names, streams, plan_phases(blend, seq_len), order.start_seqs)


def data_from_json(content: str | dict[str, Any]) -> str | Blend:
    """Return a recipe's `data` from the recipe.json of a run or a checkpoint."""
    if isinstance(content, str):
        return content
    return Blend(weights=content["weights"], changes=tuple((int(after), weights) for after, weights in content["changes"]))


def data_folders(recipe: Recipe) -> list[str]:
    """Return the folders that a recipe reads, as written in it."""
    return folders(recipe.data) if isinstance(recipe.data, Blend) else [recipe.data]
