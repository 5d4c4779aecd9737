"""Judges computed steps against others: bit for bit, within rounding, or the first quantity that differs.

What rounding makes of each quantity is measured, on the very steps that are compared: they are computed again from weights that
are all moved to a neighbouring number, which changes every rounding and nothing else. `FACTOR` times the largest difference that
`SAMPLES` such trials make, up to the step that is judged, is rounding; beyond that something else differs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tools.replay.compute import StepNumbers

SAMPLES, FACTOR = 3, 16.0
LEAST = 4 * 2.0**-23  # what is always rounding: two units in the last place of fp32, up and down
BITWISE, WITHIN_ROUNDING, DIFFERS = VERDICTS = ("bitwise equal", "equal within rounding", "differs")

# quantities of a step, in the order in which one causes the next
EXACT = ("tokens", "consumed_seqs", "consumed_tokens", "lr")  # no rounding: computed from whole numbers and the recipe
SCALARS = ("loss", "log_z", "log_z_squared", "max_logit", "grad_norm")
ONLY_ALIKE = ("loss_max", "loss_max_rank")  # of data ranks: another layout has others
COUNTED = ("loss_scale", "skipped_steps")
TOTALS = ("weight_norm", "update_norm", "update_ratio")
OF_PARAMETERS = ("grad_norm", "adam_rms", "update_norm", "update_ratio", "weight_norm")
COUNTS_OF_PARAMETERS = ("zero_share", "tiny_v_share", "nonfinite")  # a share of elements jumps: only equal bits say something
STATE = "state after the step"


@dataclass(frozen=True, kw_only=True)
class QuantityDifference:
    """A quantity of a step that is not the same on both sides."""

    step: int
    quantity: str
    before: float | str | None  # on the side that is compared with, the run's
    after: float | str | None
    difference: float  # relative
    rounding: float | None  # what rounding makes of it, measured; None where nothing is rounded
    bound: float

    @property
    def is_rounding(self) -> bool:
        return math.isfinite(self.difference) and self.difference <= self.bound

    def __str__(self) -> str:
        told = f"{self.quantity} of step {self.step}: {_shown(self.before)} and {_shown(self.after)}"
        if self.rounding is None:
            return told
        return f"{told} (relative difference {self.difference:.1e}, rounding {self.rounding:.1e}, allowed {self.bound:.1e})"


@dataclass(frozen=True, kw_only=True)
class Judgement:
    verdict: str  # of VERDICTS
    first: QuantityDifference | None  # the first quantity that differs, by more than rounding where the verdict says so
    largest: QuantityDifference | None  # of those within rounding, the one nearest to its bound
    compared: int  # quantities

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        for name in ("first", "largest"):
            if found[name] is not None:
                found[name] = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in found[name].items()}
        return found


Quantity = tuple[int, str, str, Any]  # step, name, kind, value


def quantities(step: StepNumbers, names: Sequence[str]) -> Iterator[Quantity]:
    """Return what can be compared of a step, causes before what they cause. names: of the parameters."""
    record, at = step.record, step.record["step"]
    for kind, group in (("exact", EXACT), ("rounded", SCALARS), ("alike", ONLY_ALIKE), ("exact", COUNTED)):
        yield from ((at, name, kind, record[name]) for name in group if name in record)
    for layer_stat, values in step.layers.items():
        yield from ((at, f"{layer_stat} of layer {n}", "alike", float(value)) for n, value in enumerate(values))
    for stat in (*OF_PARAMETERS, *COUNTS_OF_PARAMETERS):
        if stat in step.parameters:
            kind = "alike" if stat in COUNTS_OF_PARAMETERS else "rounded"
            values = zip(names, step.parameters[stat], strict=True)
            yield from ((at, f"{stat} of {name}", kind, float(value)) for name, value in values)
    yield from ((at, name, "rounded", record[name]) for name in TOTALS if name in record)


def differences(before: Sequence[Quantity], after: Sequence[Quantity]) -> dict[tuple[int, str], float]:
    """Return (step, quantity) -> relative difference, of the quantities on both sides that are not equal, in order."""
    theirs = {(step, name): value for step, name, _, value in before}
    found = {}
    for step, name, _, value in after:
        if (step, name) in theirs and (apart := relative(theirs[step, name], value)):
            found[step, name] = apart
    return found


def judge(
    before: Sequence[Quantity],
    after: Sequence[Quantity],
    stirred: Sequence[Sequence[Quantity]],
    *,
    alike: bool,
    state: dict[str, float] | None = None,
) -> Judgement:
    """Judge `after` by `before`. stirred: trials that differ from `after` by rounding alone; empty: bits only.

    alike: both sides are cut in the same way, so that what depends on the cut can be compared. state: differences from a
    checkpoint, by tensor.
    """
    values = {(step, name): value for step, name, _, value in before}
    differ, floors = differences(before, after), _floors(after, stirred)
    found, compared = [], 0
    for step, name, kind, value in after:
        if (step, name) not in values or (kind == "alike" and not alike):
            continue
        compared += 1
        if (step, name) in differ:
            rounding = None if kind == "exact" else floors.get((step, name), 0.0)
            bound = 0.0 if rounding is None else max(FACTOR * rounding, LEAST)
            # shares and single ranks' losses jump by rounding: they count where all else is equal, as bits
            jumps = kind == "alike"
            found.append(
                QuantityDifference(
                    step=step, quantity=name, before=values[step, name], after=value, difference=differ[step, name],
                    rounding=rounding, bound=math.inf if jumps else bound,
                )
            )  # fmt: skip
    last = after[-1][0] if after else 0
    changed = sorted(name for name, apart in (state or {}).items() if apart)
    compared += len(state or {})
    if changed and not found:
        worst = max(changed, key=lambda name: state[name])
        found.append(
            QuantityDifference(
                step=last, quantity=f"{worst}, in the checkpoint of that step", before=None, after=None,
                difference=state[worst], rounding=None, bound=0.0 if alike else math.inf,
            )
        )  # fmt: skip
    beyond = next((d for d in found if not d.is_rounding), None)
    verdict = DIFFERS if beyond else WITHIN_ROUNDING if found else BITWISE
    within = [d for d in found if d.is_rounding and math.isfinite(d.bound)]
    largest = max(within, key=lambda d: d.difference / d.bound, default=None)
    return Judgement(verdict=verdict, first=beyond or (found[0] if found else None), largest=largest, compared=compared)


def _floors(after: Sequence[Quantity], stirred: Sequence[Sequence[Quantity]]) -> dict[tuple[int, str], float]:
    """Return what rounding makes of each quantity, up to its step: one trial's may be small by chance.

    A parameter's statistic has at least the median of all parameters'.
    """
    floors: dict[tuple[int, str], float] = {}
    largest: dict[str, float] = {}
    for trial in stirred:
        for key, apart in differences(after, trial).items():
            floors[key] = max(floors.get(key, 0.0), apart)
    by_stat: dict[tuple[int, str], list[float]] = {}
    for step, name, _, _ in after:
        by_stat.setdefault((step, name.partition(" of ")[0]), []).append(floors.get((step, name), 0.0))
    for step, name, _, _ in after:
        median = float(np.median(by_stat[step, name.partition(" of ")[0]]))
        largest[name] = max(largest.get(name, 0.0), floors.get((step, name), 0.0), median)
        floors[step, name] = largest[name]
    return floors


def relative(a: Any, b: Any) -> float:
    """Return by how much two values differ, relative to the larger; 0 for equal bits, infinite where either is not finite."""
    if a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)):
        return 0.0
    if not isinstance(a, int | float) or not isinstance(b, int | float) or not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))


def _shown(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float) else "different" if value is None else str(value)
