"""Runs a replay as the flags say: against the run's own log, or down to the first tensor against a change or another run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from recipes.common.config.ds_config import precision
from recipes.common.run_dir.metrics import plain
from recipes.common.run_dir.tensor_stats import Stats
from tools.common.console import UsageError, table
from tools.common.dropout import dropout_fields
from tools.replay.against import TensorReport, against_change, against_run
from tools.replay.change import ReplayChange, changed_plan, parse_fields, parse_sequences
from tools.replay.compare import BITWISE, DIFFERS, SAMPLES, Judgement, Quantity, judge, quantities
from tools.replay.compute import RankResult, StepNumbers, compute
from tools.replay.enter import LoggedSteps, ReplayPlan, enter
from tools.replay.versions import parse_versions, release_folder


@dataclass(frozen=True, kw_only=True)
class ReplayReport:
    """What a replay found."""

    plan: ReplayPlan
    judgement: Judgement
    logged: dict[str, Any]  # the run's record of the last step
    replayed: dict[str, Any]
    change: str  # in words; empty for none
    notes: list[str]

    @property
    def is_equal(self) -> bool:
        return self.judgement.verdict != DIFFERS

    def to_json(self) -> dict[str, Any]:
        plan, numbers = self.plan, ("loss", "grad_norm", "lr")
        return {
            "run": plan.run,
            "steps": [plan.first_step, plan.last_step],
            "from": plan.come_from,
            "ranks": plan.world_size,
            "precision": precision(plan.ds_config),
            "change": self.change,
            **self.judgement.to_json(),
            "logged": {name: plain(self.logged.get(name)) for name in numbers},
            "replayed": {name: plain(self.replayed.get(name)) for name in numbers},
            "notes": self.notes,
        }

    def text(self) -> str:
        rows = [[who, *(f"{r[name]:.9g}" for name in ("loss", "grad_norm", "lr"))]
                for who, r in (("logged", self.logged), ("replayed", self.replayed))]  # fmt: skip
        lines = [described(self.plan, self.change), table(rows, [f"step {self.plan.last_step}", "loss", "gradient norm", "lr"])]
        return "\n".join([*lines, *verdict_lines(self.judgement), *self.notes])


def described(plan: ReplayPlan, change: str) -> str:
    data = plan.world_size // (plan.layout.tensor * plan.layout.pipeline)
    cut = f"tensor {plan.layout.tensor} x pipeline {plan.layout.pipeline} x data {data}, {precision(plan.ds_config)}"
    steps = f"step {plan.last_step}" if plan.first_step == plan.last_step else f"steps {plan.first_step} to {plan.last_step}"
    return f"{steps} of {plan.run} from {plan.come_from}, {cut}, {'changed: ' + change if change else 'as the run did'}"


def verdict_lines(judged: Judgement) -> list[str]:
    if judged.verdict == BITWISE:
        return [f"{BITWISE}: all {judged.compared} quantities"]
    if judged.verdict == DIFFERS:
        return [f"first to differ: {judged.first}"]
    nearest = judged.largest or judged.first
    return [f"{judged.verdict}, not bit for bit: of {judged.compared} quantities the nearest to its bound is {nearest}"]


def replay(flags: argparse.Namespace) -> ReplayReport | TensorReport:
    """Do what the flags of `python -m tools.replay` say. Raises UsageError and RecipeError for what cannot be."""
    change = ReplayChange(
        fields=parse_fields(flags.fields),
        without=parse_sequences(flags.without),
        layout=flags.layout,
        precision=flags.precision,
    )
    versions = parse_versions(flags.versions)
    if flags.step is not None and flags.step < 1:
        raise UsageError(f"--step {flags.step}: steps count from 1")
    if flags.against:
        if change != ReplayChange() or versions:
            raise UsageError("--against RUN_B compares two runs as they are; leave the run out to compare with a change")
        return against_run(flags.run, Path(flags.against), flags.step)
    if flags.step is None:
        raise UsageError("--step N is missing: which step is to be computed again")
    if flags.against is not None and change == ReplayChange() and not versions:
        raise UsageError("--against alone compares with nothing; name another run, or a change: --set, --layout, --versions, ...")
    plan, logged = enter(flags.run, flags.step)
    changed = changed_plan(plan, change)
    folders = [release_folder(package, version) for package, version in versions.items()]
    words = ", ".join(filter(None, [str(change), *(f"{package} {version}" for package, version in versions.items())]))
    if flags.against is not None:
        return against_change(plan, changed, words, folders)
    return judge_replay(plan, logged, changed, words, folders, versions)


def judge_replay(
    plan: ReplayPlan,
    logged: LoggedSteps,
    changed: ReplayPlan,
    change: str = "",
    folders: Sequence[Path] = (),
    versions: dict[str, str] | None = None,
) -> ReplayReport:
    """Compute `changed`, and judge it by the log of the run; rounding is measured where it is not bit for bit the same."""
    results = compute(changed, folders)
    before = logged_quantities(logged)
    after, state = computed_quantities(results), _state(results)
    same_cut = (changed.layout, changed.world_size) == (logged.layout, logged.world_size)
    found = judge(before, after, [], alike=same_cut, state=state)
    if found.verdict != BITWISE and not _is_exact(found):
        trials = [computed_quantities(compute(replace(changed, stir=seed), folders)) for seed in range(SAMPLES)]
        found = judge(before, after, trials, alike=same_cut, state=state)
    return ReplayReport(
        plan=changed,
        judgement=found,
        logged=logged.records[plan.last_step],
        replayed=results[0].steps[-1].record,
        change=change,
        notes=_notes(plan, changed, logged, versions or {}, found, same_cut),
    )


def _is_exact(found: Judgement) -> bool:
    """Whether a quantity that nothing rounds differs first, so that rounding need not be measured."""
    return found.first is not None and found.first.rounding is None


def logged_quantities(logged: LoggedSteps) -> list[Quantity]:
    names = logged.stats.names if logged.stats is not None else ()
    steps = [StepNumbers(r, *_stats_at(logged.stats, step)) for step, r in sorted(logged.records.items())]
    return [quantity for step in steps for quantity in quantities(step, names)]


def computed_quantities(results: Sequence[RankResult]) -> list[Quantity]:
    return [quantity for step in results[0].steps for quantity in quantities(step, results[0].names)]


def _stats_at(stats: Stats | None, step: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    found = []
    for steps, values in ((stats.steps, stats.values), (stats.activation_steps, stats.activations)) if stats else ():
        rows = np.flatnonzero(steps == step)
        found.append({name: column[rows[-1]] for name, column in values.items()} if rows.size else {})
    return (found[0], found[1]) if found else ({}, {})


def _state(results: Sequence[RankResult]) -> dict[str, float] | None:
    if any(result.state is None for result in results):
        return None
    state: dict[str, float] = {}
    for result in results:
        for name, apart in result.state.items():
            state[name] = max(state.get(name, 0.0), apart)
    return state


def _notes(
    plan: ReplayPlan,
    changed: ReplayPlan,
    logged: LoggedSteps,
    versions: dict[str, str],
    found: Judgement,
    same_cut: bool,
) -> list[str]:
    """Say what may explain a difference: what is not as it was when the run computed the steps."""
    notes = []
    if found.verdict == BITWISE:
        return notes
    if not same_cut:
        notes.append("another layout than the run's adds numbers in another order: equal bits are not to be expected")
        dropped = dropout_fields(plan.recipe.model)
        if dropped:
            notes.append(
                f"dropout draws other zeros in another layout ({', '.join(dropped)}): only the run's own layout compares"
            )
    here = {name: versions.get(name) or _installed(name) for name in logged.versions}
    other = [f"{name} {then} (here {here[name]})" for name, then in logged.versions.items() if here[name] != then]
    if other:
        notes.append(f"the run was computed with other versions: {', '.join(other)}")
    return notes


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
