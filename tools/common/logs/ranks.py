"""Makes one run of what several ranks printed into one log: each step once, with the loss of a rank that has one."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

PLACEHOLDER = -1.0  # what torchtitan prints as the loss on ranks without the last pipeline stage
ECHO_ROWS = 8  # a row with the same numbers as one of so many before it is another rank's

# [rank0]: of torchrun's --tee and of torchtitan, [default0]: of torchrun, [host:0]: of its log line prefix, 0: of srun --label,
# |DP=0|PP=1|TP=0| of nanotron
_RANK = re.compile(r"^\s*(?:\[((?:rank|default)\d+|[\w.-]+:\d+)\]:?|(\d+):(?=\s))|\|(DP=\d+\|PP=\d+\|TP=\d+)")


@dataclass(frozen=True)
class Row:
    """The numbers of a step, as one rank printed them."""

    rank: str | None  # None: the line does not say
    step: int
    values: dict[str, float]


def rank_of(line: str) -> str | None:
    """Return what a line says of the rank that printed it."""
    found = _RANK.search(line)
    return None if found is None else next(group for group in found.groups() if group is not None)


def merge_ranks(rows: Iterable[Row]) -> list[tuple[int, dict[str, float]]]:
    """Return (step, numbers) in order. A rank whose own steps go back shows a restart: the steps count anew from there."""
    merged: list[tuple[int, dict[str, float]]] = []
    attempt: dict[int, tuple[str | None, dict[str, float]]] = {}
    newest: dict[str | None, int] = {}  # step of each rank in this attempt
    recent: deque[Row] = deque(maxlen=ECHO_ROWS)
    for row in rows:
        back = row.step < newest.get(row.rank, row.step)
        if back and row.rank is None and any(other.step == row.step and other.values == row.values for other in recent):
            continue
        recent.append(row)
        if back:
            merged += _in_order(attempt)
            attempt, newest = {}, {}
        newest[row.rank] = row.step
        rank, values = attempt.get(row.step, (row.rank, {}))
        attempt[row.step] = row.rank, _combined(values, row.values, same_rank=rank == row.rank)
    return merged + _in_order(attempt)


def _in_order(attempt: dict[int, tuple[str | None, dict[str, float]]]) -> list[tuple[int, dict[str, float]]]:
    return [(step, attempt[step][1]) for step in sorted(attempt)]


def _combined(old: dict[str, float], new: dict[str, float], *, same_rank: bool) -> dict[str, float]:
    """Return the numbers of a step printed twice: the later of one rank, the first of several, but for no loss at all."""
    if new.get("loss", PLACEHOLDER) == PLACEHOLDER:
        return {**new, **old}
    if same_rank or old.get("loss", PLACEHOLDER) == PLACEHOLDER:
        return {**old, **new}
    return {**new, **old}
