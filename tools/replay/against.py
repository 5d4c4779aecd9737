"""Goes down from the first step at which two runs, or a run and a change of it, differ to the first tensor that does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from recipes.common.config.ds_config import precision
from recipes.common.run_dir.metrics import read_metrics
from recipes.common.run_dir.tensor_stats import read_stats
from tools.common.console import UsageError
from tools.replay.change import ReplayChange, changed_plan
from tools.replay.compare import Quantity, differences, quantities
from tools.replay.compute import RankResult, StepNumbers, compute, with_shapes
from tools.replay.enter import ReplayPlan, enter
from tools.replay.first_tensor import (
    TRIALS,
    FirstTensor,
    compared,
    first_tensor,
    largest_difference,
    outlying_state,
    put_together,
    state_differs,
)

# Two runs in different layouts drift apart by rounding; which step is looked into is chosen by these, and only then measured
SCREEN = {"fp32": {"loss": 1e-5, "grad_norm": 1e-4}, "bf16": {"loss": 2e-3, "grad_norm": 5e-2}}
_BLOCK_STEPS = 500  # of two logs at a time


@dataclass(frozen=True, kw_only=True)
class TensorReport:
    """What a search for the first tensor found."""

    sides: tuple[str, str]
    step: int | None  # that was looked into; None where the logs are equal
    quantity: str  # of the logs, the first that differs; empty for none
    first: FirstTensor | None
    tensors: tuple[int, int]  # compared, and not comparable
    is_bitwise: bool
    is_equal: bool
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        if found["first"] is not None:
            found["first"] = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in found["first"].items()}
            found["first"]["text"] = str(self.first)
        return found

    def text(self) -> str:
        lines = [f"{self.sides[0]} against {self.sides[1]}"]
        if self.quantity:
            lines.append(f"first to differ in the logs: {self.quantity}")
        if self.first is not None:
            lines.append(f"step {self.first.step}: {self.first}")
        elif self.step is not None:
            how = "bit for bit" if self.is_bitwise else "within rounding"
            lines.append(f"step {self.step}: all {self.tensors[0]} tensors are equal {how}, as computed here")
        elif self.is_equal:
            lines.append("the logs are equal bit for bit")
        if self.tensors[1]:
            lines.append(f"{self.tensors[1]} tensors were not compared: how they are cut in these layouts is not known")
        return "\n".join([*lines, *self.notes])


def against_change(plan: ReplayPlan, changed: ReplayPlan, words: str, folders: Sequence[Path]) -> TensorReport:
    """Compare a run with a change of it, from the checkpoint before the step."""
    plan = changed_plan(plan, ReplayChange())  # in one process, where the run had many ranks
    search = Search(plan, changed, folders)
    found = search.at(plan.first_step)
    step, quantity = plan.first_step, ""
    if found is None and plan.last_step > plan.first_step:  # the change shows later: a schedule, a ramp, the order of data
        ours, theirs = compute(plan), compute(changed, folders)
        first = _first_beyond(_by_step(ours), _by_step(theirs), alike=search.bitwise, of=precision(plan.ds_config))
        if first is not None:
            step, quantity = first
            found = search.down_from(step)
    return search.report((plan.run, f"the same, changed: {words}"), step, quantity, found, [])


def against_run(run_a: Path, run_b: Path, last_step: int | None) -> TensorReport:
    """Compare two runs: their logs for the first step that differs, then both computed again for the first tensor."""
    common = sorted(_steps(run_a) & _steps(run_b))
    if not common:
        raise UsageError(f"{run_a} and {run_b} have no step in common in their metrics.jsonl")
    if last_step is not None and last_step not in common:
        raise UsageError(f"--step {last_step}: the two runs have steps {common[0]} to {common[-1]} in common; name one of them")
    last_step = last_step or common[-1]
    cuts = [enter(run, last_step)[1] for run in (run_a, run_b)]
    alike = (cuts[0].layout, cuts[0].world_size) == (cuts[1].layout, cuts[1].world_size)
    kind = precision(enter(run_a, last_step)[0].ds_config)
    first = _first_in_logs(run_a, run_b, last_step, alike=alike, of=kind)
    sides = (str(run_a), str(run_b))
    if first is None and alike:
        return TensorReport(
            sides=sides, step=None, quantity="", first=None, tensors=(0, 0), is_bitwise=True, is_equal=True, notes=[]
        )
    step, quantity = first or (last_step, "")
    plan = changed_plan(enter(run_a, step)[0], ReplayChange())
    own = changed_plan(enter(run_b, step)[0], ReplayChange())
    if alike:
        search = Search(plan, own, ())
        found = search.down_from(step)
    else:
        # two layouts drift apart by rounding: from one state, which both can read, only what this step rounds is between them
        search = Search(
            plan, changed_plan(enter(run_b, step, beginning=(plan.position.step, plan.checkpoint))[0], ReplayChange()), ()
        )
        found = search.at(search.first_step) or (search.down_from(step) if first is not None else None)
        if found is None and first is not None:
            search = Search(plan, own, ())
            found = search.outlying_state()
    if found is None and first is None:
        step = search.first_step
    notes = _notes(run_a, run_b, search) if found is None and first is not None else []
    return search.report(sides, step, quantity, found, notes)


class Search:
    """Traces steps of two plans and compares them. Each traced step of a side is computed once."""

    def __init__(self, before: ReplayPlan, after: ReplayPlan, folders: Sequence[Path]) -> None:
        """folders: releases with which `after` is computed."""
        # another release works out its own shapes
        self._before, self._after = (*with_shapes(before), after) if folders else with_shapes(before, after)
        self._folders = folders
        cut = (before.layout, before.world_size, precision(before.ds_config), before.recipe.batch.micro_seqs)
        self.bitwise = cut == (after.layout, after.world_size, precision(after.ds_config), after.recipe.batch.micro_seqs)
        self.first_step = max(before.first_step, after.first_step)
        self.last_step = min(before.last_step, after.last_step)
        self.results: dict[int, tuple[list[RankResult], list[RankResult]]] = {}
        self._stirred: dict[int, list[Mapping]] = {}

    def at(self, step: int) -> FirstTensor | None:
        """Return the first tensor of a step that differs."""
        if step not in self.results:
            self.results[step] = (self._traced(self._before, step), self._traced(self._after, step, self._folders))
        ours, theirs = map(put_together, self.results[step])
        found = first_tensor(step, ours, theirs, [], bitwise=True)
        if found is None:
            return None
        if step not in self._stirred:  # what rounding makes of each tensor: measured where it is asked for
            trials = (replace(self._before, stir=seed) for seed in range(TRIALS))
            self._stirred[step] = [put_together(self._traced(trial, step)) for trial in trials]
        return first_tensor(step, ours, theirs, self._stirred[step], bitwise=self.bitwise)

    def down_from(self, step: int) -> FirstTensor | None:
        """Return the first tensor that differs at `step`, or at the step before it from which the state differs."""
        found = self.at(step)
        low, high = self.first_step, step  # the state before `high` differs
        if not state_differs(found) or low == high:
            return found
        if state_differs(earliest := self.at(low)):
            return earliest
        while high - low > 1:
            middle = (low + high) // 2
            if state_differs(self.at(middle)):
                high = middle
            else:
                low = middle
        return self.at(low) or found

    def outlying_state(self) -> FirstTensor | None:
        """Return what differs most, by far, before the first step that both sides can compute."""
        step = self.first_step
        self.results[step] = (self._traced(self._before, step), self._traced(self._after, step, self._folders))
        return outlying_state(step, *map(put_together, self.results[step]))

    def report(
        self, sides: tuple[str, str], step: int, quantity: str, found: FirstTensor | None, notes: list[str]
    ) -> TensorReport:
        """Make the report, with the largest difference of an element of the tensor that was found."""
        if found is not None:
            watch = (f"{found.kind}|{found.name}",)
            ours = self._traced(replace(self._before, watch=watch), found.step)
            theirs = self._traced(replace(self._after, watch=watch), found.step, self._folders)
            parts = [[part for result in side for part in result.watched] for side in (ours, theirs)]
            found = replace(found, largest=largest_difference(*parts))
        at = found.step if found is not None else step if step in self.results else max(self.results)
        return TensorReport(
            sides=sides,
            step=at,
            quantity=quantity,
            first=found,
            tensors=compared(*map(put_together, self.results[at])),
            is_bitwise=self.bitwise,
            is_equal=found is None and not quantity,
            notes=notes,
        )

    def _traced(self, plan: ReplayPlan, step: int, folders: Sequence[Path] = ()) -> list[RankResult]:
        return compute(replace(plan, last_step=step, trace_step=step), folders)


def _steps(folder: Path) -> set[int]:
    return {r["step"] for r in read_metrics(folder, skip_damaged=True) if "loss" in r}


def _by_step(results: Sequence[RankResult]) -> Iterator[tuple[int, list[Quantity]]]:
    for step in results[0].steps:
        yield step.record["step"], list(quantities(step, results[0].names))


def _first_in_logs(run_a: Path, run_b: Path, last_step: int, *, alike: bool, of: str) -> tuple[int, str] | None:
    for first in range(1, last_step + 1, _BLOCK_STEPS):
        blocks = [_block(run, first, min(first + _BLOCK_STEPS - 1, last_step)) for run in (run_a, run_b)]
        if found := _first_beyond(*blocks, alike=alike, of=of):
            return found
    return None


def _block(folder: Path, first: int, last: int) -> Iterator[tuple[int, list[Quantity]]]:
    records = {r["step"]: r for r in read_metrics(folder, skip_damaged=True) if "loss" in r and first <= r["step"] <= last}
    try:
        stats = read_stats(folder, first, last)
    except FileNotFoundError:
        stats = None
    for step, record in sorted(records.items()):
        rows = np.flatnonzero(stats.steps == step) if stats is not None else []
        values = {name: column[rows[-1]] for name, column in stats.values.items()} if len(rows) else {}
        yield step, list(quantities(StepNumbers(record, values, {}), stats.names if stats is not None else ()))


def _first_beyond(
    before: Iterator[tuple[int, list[Quantity]]], after: Iterator[tuple[int, list[Quantity]]], *, alike: bool, of: str
) -> tuple[int, str] | None:
    """Return (step, the quantity with both values) of the first step that differs: by a bit, or by more than is screened."""
    theirs = dict(after)
    is_beyond: Callable[[str, float], bool] = partial(_screened, SCREEN["fp32" if of == "fp32" else "bf16"])
    for step, ours in before:
        if step not in theirs:
            continue
        exact = {name for _, name, kind, _ in ours if kind == "exact"}
        for (_, name), apart in differences(ours, theirs[step]).items():
            if alike or name in exact or is_beyond(name, apart):
                values = [next(v for _, n, _, v in side if n == name) for side in (ours, theirs[step])]
                return step, f"{name} of step {step}, {values[0]:.9g} and {values[1]:.9g}"
    return None


def _screened(bounds: Mapping[str, float], name: str, apart: float) -> bool:
    return not apart <= bounds.get(name, math.inf)


def _notes(run_a: Path, run_b: Path, search: Search) -> list[str]:
    """Say of each run whether it is computed here as it was logged: where its tensors are equal here, its log is what differs."""
    notes = []
    for run, results in zip((run_a, run_b), next(iter(search.results.values())), strict=True):
        step = results[0].steps[-1].record["step"]
        logged = enter(run, step)[1]
        computed = results[0].steps[-1].record
        wrong = [
            f"{name} {logged.records[step][name]:.9g} (here {computed[name]:.9g})"
            for name in ("loss", "grad_norm")
            if abs(logged.records[step][name] - computed[name]) > 1e-6 * abs(computed[name])
        ]
        if wrong:
            versions = ", ".join(
                f"{name} {version}" for name, version in logged.versions.items() if name in ("torch", "deepspeed")
            )
            notes.append(
                f"{run} logged {', '.join(wrong)}: not what its checkpoint, its data and this code give. It ran with {versions} "
                f"on {logged.device}: try --versions, or suspect the hardware"
            )
    return notes
