"""Finds the first step at which the numbers of two runs part, and says by how much against the rounding to be expected.

Two runs that compute the same in another order, or with other kernels, differ by rounding. Of a number v that is computed in a
type of unit roundoff u (fp32 6e-8, fp16 5e-4, bf16 4e-3) and, as the losses are, averaged over the T tokens of a step, the
rounding to be expected at the first step that differs is

    8 |v| (u_fp32 + u / sqrt(T))        (without the mean: 8 |v| (u_fp32 + u))

8: a number goes through some dozens of roundings, which add up as a random walk does. Every further step rounds anew and starts
from weights that differ already, so k steps later (k + 1) times as much is expected. A log adds half of the last digit that it
prints, at every step. Counters, and the learning rate, which is arithmetic on them, have no rounding. Rounding also grows
smoothly: a step at which the difference is over 8 times its largest so far, over all of this and over the noise of the steps, is
a jump, and named.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from tools.common.logs.run_numbers import Table

ROUNDOFF = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}  # the largest relative error of one rounding
WALK = 8.0  # the square root of some dozens of roundings; and how fast rounding may grow from step to step
EXACT = ("step", "tokens", "consumed_tokens", "consumed_seqs", "lr", "lr_factor", "skipped_steps", "loss_scale", "rewinds",
         "rewound_from_step", "loss_max_rank")  # fmt: skip
MEANS = ("loss", "val_loss", "loss_max", "log_z")  # over the tokens of the step
EVERY_STEP = (
    "loss",
    "grad_norm",
)  # not finite in one run, they differ there; another number may not have been taken at that step
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


def compare_metrics(a: Table, b: Table, precision: str, printed: tuple[bool, bool] = (False, False)) -> Metrics | None:
    """Compare the steps that both have; None without any. printed: which of the two is a log, with the digits that it shows."""
    steps, in_a, in_b = np.intersect1d(a["step"], b["step"], return_indices=True)
    if not len(steps):
        return None
    names = [name for name in a if name in b and name != "step" and not _of_times(name)]
    columns = {name: (a[name][in_a], b[name][in_b]) for name in names}
    taken = {name: ~np.isnan(both) for name, both in columns.items()}  # by both at one step, or else there is nothing to compare
    columns = {name: both for name, both in columns.items() if taken[name].all(axis=0).any()}
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


def expected_rounding(column: str, value: np.ndarray, tokens: np.ndarray, precision: str) -> np.ndarray:
    """Return the rounding to be expected of `value` [n] at a first step that differs."""
    if column in EXACT:
        return np.zeros(len(value))
    unit = (
        ROUNDOFF[precision] / np.sqrt(np.maximum(np.nan_to_num(tokens, nan=1.0), 1.0))
        if _is_mean(column)
        else ROUNDOFF[precision]
    )
    return WALK * np.abs(value) * (ROUNDOFF["fp32"] + unit)


def step_noise(values: np.ndarray) -> float:
    """Return the noise of a column from step to step: robust, of its second differences, which a slope does not touch."""
    known = values[np.isfinite(values)]
    if len(known) < 4:
        return 0.0
    return float(np.median(np.abs(np.diff(known, 2))) * 1.4826 / math.sqrt(6))


def _part(
    name: str, steps: np.ndarray, a: np.ndarray, b: np.ndarray, tokens: np.ndarray, precision: str, printed: tuple[bool, bool]
) -> Parting | None:
    missing = np.isnan((a, b))
    known = ~missing.all(axis=0) if name in EVERY_STEP[: 1 if any(printed) else 2] else ~missing.any(axis=0)
    steps, a, b, tokens = steps[known], a[known], b[known], tokens[known]
    apart = np.flatnonzero(a != b)
    if not len(apart):
        return None
    first = int(apart[0])
    each = expected_rounding(name, a, tokens, precision)
    digits = sum((_half_digit(values) for values, of_log in zip((a, b), printed, strict=True) if of_log), np.zeros(len(a)))
    noise = step_noise(a[: first + 1] if first > 8 else a)
    expected = each[first:] * (steps[first:] - steps[first] + 1) + digits[first:]
    jump = _jump(steps[first:], np.abs(b - a)[first:], expected, noise, exact=name in EXACT)
    return Parting(name, int(steps[first]), float(a[first]), float(b[first]), float(expected[0]), noise, jump)


def _jump(steps: np.ndarray, difference: np.ndarray, expected: np.ndarray, noise: float, *, exact: bool) -> int | None:
    """Return the first step whose difference is not rounding's."""
    difference = np.where(np.isnan(difference), np.inf, difference)
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


def _half_digit(values: np.ndarray) -> np.ndarray:
    """Return half of the last digit that a log prints of each value [n]: it prints so many decimals, or so many digits in all."""
    known = [Decimal(repr(float(v))).as_tuple() for v in values[np.isfinite(values) & (values != 0)][:200]]
    decimals = min((found.exponent for found in known), default=0)
    digits = max((len(found.digits) for found in known), default=0)
    with np.errstate(divide="ignore"):
        first = np.floor(np.log10(np.abs(values)))
    by_digits = np.where(np.isfinite(first), 10.0 ** (np.nan_to_num(first, posinf=0.0, neginf=0.0) + 1 - digits), 0.0)
    unit = np.maximum(by_digits, 10.0**decimals) if known else np.zeros(len(values))
    return unit / 2 * (1 + 1e-6)  # a tie, in binary, is a little more


def told_columns(metrics: Metrics) -> Iterator[Parting]:
    """Yield the partings that a table shows: the known columns, then the others."""
    yield from sorted(
        metrics.partings, key=lambda p: (FIRST.index(p.column) if p.column in FIRST else len(FIRST), p.step, p.column)
    )
