"""Measures what is odd about the sequences of a step by their tokens: repetition, rare tokens, copies of one another."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from recipes.common.anomalies.robust_window import MAD_TO_SD
from recipes.common.data.order import kept_index
from tools.data.lookup import DataOrder, StepRead, open_run

NGRAM = 8  # ordinary text seldom repeats one within a sequence
USUAL_SEQS, REFERENCE_SEQS = 256, 64  # to count tokens in, and others to compare a step with
MEASURES = {
    "repeated": ("repeats itself", 1),
    "surprise": ("rare tokens", 1),
    "new_bigrams": ("pairs of tokens that the data never shows", 1),
    "distinct": ("few different tokens", -1),
}


@dataclass(frozen=True)
class SequenceStats:
    """The measures of one sequence."""

    repeated: float  # share of its n-grams that it had before
    surprise: float  # mean -log p of its tokens under their frequency in the data, in nats
    new_bigrams: float  # share of its neighbouring pairs of tokens that ordinary sequences never show
    copy_of: int | None  # index in the step of an earlier sequence that shares over half of its n-grams
    distinct: float  # distinct tokens, as a share of its length


@dataclass(frozen=True)
class TokenFrequencies:
    """Frequencies of tokens and bigrams in ordinary sequences of the run."""

    log_p: np.ndarray  # float64 [highest id + 1]
    floor: float  # log p of an id that was not seen
    bigrams: frozenset[tuple[int, int]]

    def surprise(self, ids: np.ndarray) -> float:
        known = ids < len(self.log_p)
        return -float(np.where(known, self.log_p[np.where(known, ids, 0)], self.floor).mean())

    def new_bigrams(self, ids: np.ndarray) -> float:
        bigrams = list(zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True))
        return sum(bigram not in self.bigrams for bigram in bigrams) / max(len(bigrams), 1)


def read_tokens(run: DataOrder, consumed: np.ndarray) -> np.ndarray:
    """Return the consumed-th sequences of a run: int64 [k, seq_len + 1]."""
    return open_run(run).read_sequences(run.seed, kept_index(consumed, run.skips))


def step_tokens(run: DataOrder, step: StepRead) -> np.ndarray:
    return read_tokens(run, step.consumed + np.arange(step.seqs))


def ordinary_sequences(run: DataOrder, step: StepRead) -> tuple[TokenFrequencies, np.ndarray]:
    """Return token frequencies of this data, and other ordinary sequences, int64 [k, seq_len + 1], to compare the step with.

    Both are of the sequences read before the step, the nearest first, and of those after it where there are too few.
    """
    wanted = USUAL_SEQS + REFERENCE_SEQS
    before = np.arange(max(step.consumed - wanted, run.order.start_seqs), step.consumed)
    after = step.consumed + step.seqs + np.arange(wanted - len(before))
    tokens = read_tokens(run, np.random.default_rng(0).permutation(np.concatenate([before, after])))
    known, reference = tokens[:USUAL_SEQS], tokens[USUAL_SEQS:]
    counts = np.bincount(known.ravel()).astype(np.float64) + 0.5
    bigrams = frozenset(zip(known[:, :-1].ravel().tolist(), known[:, 1:].ravel().tolist(), strict=True))
    total = counts.sum()
    return TokenFrequencies(np.log(counts / total), float(np.log(0.5 / total)), bigrams), reference


def sequence_stats(tokens: np.ndarray, ordinary: TokenFrequencies) -> list[SequenceStats]:
    """Measure each sequence of `tokens`, int64 [k, seq_len + 1]."""
    grams = [_ngrams(row) for row in tokens]
    found = []
    for index, row in enumerate(tokens):
        distinct = set(grams[index])
        repeated = 1 - len(distinct) / max(len(grams[index]), 1)
        copy_of = next((e for e in range(index) if distinct and len(distinct & set(grams[e])) > len(distinct) / 2), None)
        words = len(set(row.tolist())) / len(row)
        found.append(SequenceStats(repeated, ordinary.surprise(row), ordinary.new_bigrams(row), copy_of, words))
    return found


@dataclass(frozen=True)
class Oddity:
    """A sequence of a step that stands out from ordinary ones."""

    index: int  # in the step
    what: str
    z: float  # in robust spreads of the ordinary sequences


def oddities(here: list[SequenceStats], ordinary: list[SequenceStats]) -> list[Oddity]:
    """Return how far each sequence stands out by each measure, the farthest first."""
    found = []
    for name, (words, sign) in MEASURES.items():
        base = np.array([getattr(stats, name) for stats in ordinary])
        middle = float(np.median(base))
        spread = max(MAD_TO_SD * float(np.median(np.abs(base - middle))), float(np.std(base)) / 2, 0.02 * (1 + abs(middle)))
        values = (getattr(stats, name) for stats in here)
        found += [Oddity(index, words, sign * (value - middle) / spread) for index, value in enumerate(values)]
    return sorted(found, key=lambda oddity: -oddity.z)


def most_repeated(row: np.ndarray) -> tuple[tuple[int, ...], int]:
    """Return the commonest n-gram of a sequence, and how often it comes."""
    counts = Counter(_ngrams(row))
    return counts.most_common(1)[0] if counts else ((), 0)


def _ngrams(row: np.ndarray) -> list[tuple[int, ...]]:
    ids = row.tolist()
    return [tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]
