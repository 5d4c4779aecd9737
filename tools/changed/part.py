"""Finds the first step at which the numbers of two runs part, and says by how much against the rounding to be expected.

Two runs that compute the same in another order, or with other kernels, differ by rounding. Of a number v that is computed in a
type of unit roundoff u (fp32 6e-8, fp16 5e-4, bf16 4e-3) and, as the losses are, averaged over the T tokens of a step, the
rounding to be expected at the first step that differs is

    8 |v| (u_fp32 + u / sqrt(T))        (without the mean: 8 |v| (u_fp32 + u))

8: a number goes through some dozens of roundings, which add up as a random walk does. Every further step rounds anew and starts
from weights that differ already, so k steps later (k + 1) times as much is expected. A log adds half of the last digit that it
prints. Counters, and the learning rate, which is arithmetic on them, have no rounding. Rounding also grows smoothly: a step at
which the difference is over 8 times its largest so far, over all of this and over the noise of the steps, is a jump, and named.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.common.logs.run_numbers import Table

ROUNDOFF = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}  # the largest relative error of one rounding
WALK = 8.0  # the square root of some dozens of roundings; and how fast rounding may grow from step to step
EXACT = ("step", "tokens", "consumed_tokens", "consumed_seqs", "lr", "lr_factor", "skipped_steps", "loss_scale", "rewinds",
         "rewound_from_step", "loss_max_rank")  # fmt: skip
MEANS = ("loss", "val_loss", "loss_max", "log_z")  # over the tokens of the step
NOT_TRAINED = ("seconds", "tokens_per_second", "data_wait_share", "save_seconds", "save_stall_seconds", "loss_excess")
FIRST = ("loss", "grad_norm", "lr", "consumed_seqs", "consumed_tokens", "tokens")  # the order in which columns are told


@dataclass(frozen=True)
class Parting:
    """A column of two runs, from its first step that differs on."""

    column: str
    step: int  # the first that differs
    a: float
    b: float
    expected: float  # rounding there; 0 for what is exact
    noise: float  # from step to step, of the first run
    jump: int | None  # the first step whose difference is not rounding's

    @property
    def difference(self) -> float:
        return self.b - self.a if math.isfinite(self.a) and math.isfinite(self.b) else math.inf

    @property
    def within_rounding(self) -> bool:
        return self.jump is None

    def as_json(self) -> dict[str, Any]:
        content = vars(self) | {"difference": self.difference, "within_rounding": self.within_rounding}
        return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in content.items()}


@dataclass(frozen=True)
class Metrics:
    """The numbers of two runs at the steps that both have."""

    steps: np.ndarray  # [n]
    equal: tuple[str, ...]  # columns without any difference
    partings: tuple[Parting, ...]  # of the others, the earliest first
    precision: str  # the coarser of the two
    columns: dict[str, tuple[np.ndarray, np.ndarray]]  # of both, at the common steps

    def of(self, column: str) -> Parting | None:
        return next((parting for parting in self.partings if parting.column == column), None)

    @property
    def first(self) -> Parting | None:
        return self.partings[0] if self.partings else None


def compare_metrics(a: Table, b: Table, precision: str, printed: bool = False) -> Metrics | None:
    """Compare the steps that both have; None without any. printed: the numbers of one are a log's, with the digits it shows."""
    steps, in_a, in_b = np.intersect1d(a["step"], b["step"], return_indices=True)
    if not len(steps):
        return None
    names = [name for name in a if name in b and name != "step" and not _of_times(name)]
    columns = {name: (a[name][in_a], b[name][in_b]) for name in names}
    columns = {name: both for name, both in columns.items() if np.isfinite(both[0]).any() and np.isfinite(both[1]).any()}
    tokens = columns["tokens"][0] if "tokens" in columns else np.ones(len(steps))
    found = {name: _part(name, steps, *both, tokens, precision, printed) for name, both in columns.items()}
    order = {name: place for place, name in enumerate(FIRST)}
    partings = sorted((p for p in found.values() if p), key=lambda p: (p.step, order.get(p.column, len(order)), p.column))
    return Metrics(steps, tuple(name for name, p in found.items() if p is None), tuple(partings), precision, columns)


def coarser(*precisions: str) -> str:
    return max(precisions, key=ROUNDOFF.__getitem__)


def precision_of(facts: Mapping[str, Any]) -> str | None:
    """Return the type that a run computes in; None where nothing says so."""
    if not any(name.startswith("deepspeed.") for name in facts):
        return None
    return next((name for name in ("bf16", "fp16") if facts.get(f"deepspeed.{name}.enabled") is True), "fp32")


def expected_rounding(column: str, value: np.ndarray, tokens: np.ndarray, precision: str, digit: float = 0.0) -> np.ndarray:
    """Return the rounding to be expected of `value` [n] at a first step that differs. digit: the last one that is printed."""
    if column in EXACT:
        return np.full(len(value), digit / 2)
    unit = (
        ROUNDOFF[precision] / np.sqrt(np.maximum(np.nan_to_num(tokens, nan=1.0), 1.0))
        if _is_mean(column)
        else ROUNDOFF[precision]
    )
    return WALK * np.abs(value) * (ROUNDOFF["fp32"] + unit) + digit / 2


def step_noise(values: np.ndarray) -> float:
    """Return the noise of a column from step to step: robust, of its second differences, which a slope does not touch."""
    known = values[np.isfinite(values)]
    if len(known) < 4:
        return 0.0
    return float(np.median(np.abs(np.diff(known, 2))) * 1.4826 / math.sqrt(6))


def _part(
    name: str, steps: np.ndarray, a: np.ndarray, b: np.ndarray, tokens: np.ndarray, precision: str, printed: bool
) -> Parting | None:
    known = ~(np.isnan(a) & np.isnan(b))
    steps, a, b, tokens = steps[known], a[known], b[known], tokens[known]
    apart = np.flatnonzero(a != b)
    if not len(apart):
        return None
    first = int(apart[0])
    digit = max(_last_digit(a), _last_digit(b)) if printed else 0.0
    each = expected_rounding(name, a, tokens, precision, digit)
    noise = step_noise(a[: first + 1] if first > 8 else a)
    jump = _jump(steps[first:], np.abs(b - a)[first:], each[first:], noise, exact=name in EXACT)
    return Parting(name, int(steps[first]), float(a[first]), float(b[first]), float(each[first]), noise, jump)


def _jump(steps: np.ndarray, difference: np.ndarray, each: np.ndarray, noise: float, *, exact: bool) -> int | None:
    """Return the first step whose difference is not rounding's."""
    difference = np.where(np.isnan(difference), np.inf, difference)
    expected = each * (1 if exact else steps - steps[0] + 1)
    over = difference > expected
    if not exact:
        before = np.maximum.accumulate(np.append(0.0, difference[:-1]))  # the largest so far
        over &= difference > WALK * before
        over[1:] &= difference[1:] > noise  # once apart, two runs differ by up to what a step differs from the next
    return int(steps[over.argmax()]) if over.any() else None


def _of_times(name: str) -> bool:
    return name.partition("/")[0] in NOT_TRAINED


def _is_mean(name: str) -> bool:
    return name.partition("/")[0] in MEANS


def _last_digit(values: np.ndarray) -> float:
    """Return the unit of the last decimal that a log prints of a column; 0 where it prints all."""
    digits = [len(repr(float(v)).partition(".")[2]) for v in values[np.isfinite(values)][:200] if "e" not in repr(float(v))]
    return 10.0 ** -max(digits, default=0) if digits and max(digits) <= 8 else 0.0


def told_columns(metrics: Metrics) -> Iterator[Parting]:
    """Yield the partings that a table shows: the known columns, then the others."""
    yield from sorted(
        metrics.partings, key=lambda p: (FIRST.index(p.column) if p.column in FIRST else len(FIRST), p.step, p.column)
    )
