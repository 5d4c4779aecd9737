"""`spikes replay RUN STEP`: computes a step again from the checkpoint before it, with the training code itself.

The same batch, another batch, and in fp32: which of them makes an event go away says where it comes from. Losses and norms
are compared with the log, bit for bit in the run's own layout and number of ranks, else to rounding. The run directory is only
read. `python -m tools.replay` does the computing, and goes down to the first tensor that differs.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from recipes.common.config.ds_config import precision
from recipes.common.recipe import RecipeError
from recipes.common.run_dir.metrics import read_metrics
from tools.common.console import FAILED, GOOD, CheckError, UsageError, printable, table
from tools.replay.change import ReplayChange, changed_plan
from tools.replay.compare import relative
from tools.replay.compute import compute
from tools.replay.enter import LoggedSteps, ReplayPlan, enter
from tools.spikes.evidence.case import expected

ROUNDING = 1e-3  # relative: fp32 in another layout agrees to 1e-6, bf16 to about this
STANDS_OUT = 4.0  # robust spreads above the usual loss: an event
GONE = 0.5  # share of the excess: with less left, the event has gone away


@dataclass(frozen=True)
class Replayed:
    """The numbers of one trial."""

    what: str  # "same batch", "other batch", "fp32"
    losses: list[float]  # of every step from the checkpoint on
    grad_norms: list[float]
    bitwise_comparable: bool


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("step", type=int, metavar="STEP", help="counts from 1, as in metrics.jsonl")
    parser.add_argument("--other-batch", action="store_true", help="also: another batch at that step")
    parser.add_argument("--fp32", action="store_true", help="also: all steps since the checkpoint in fp32")
    parser.add_argument("--layout", metavar="tensor=2,data=2", help="default: the run's own, or one process if it had over 8")


def run(flags: argparse.Namespace) -> int:
    found = replay_step(flags.run, flags.step, other_batch=flags.other_batch, fp32=flags.fp32, layout=flags.layout)
    if flags.json:
        print(json.dumps(found))
    else:
        print(printable(_report(found)))
    return GOOD if found["reproducible"] else FAILED


def replay_step(
    folder: Path, step: int, *, other_batch: bool = False, fp32: bool = False, layout: str | None = None
) -> dict[str, Any]:
    """Replay a step and judge it. Raises UsageError where the run cannot be replayed."""
    own, logged = enter(folder, step)
    try:
        plan = changed_plan(own, ReplayChange(layout=layout))
        trials = [("same batch", plan)]
        if other_batch:  # sequences as far ahead as the run has consumed: none that it had read
            trials.append(("other batch", replace(plan, other_batch_at=2 * logged.records[step]["consumed_seqs"])))
        if fp32:
            if precision(own.ds_config) == "fp32":
                raise UsageError(f"--fp32: {folder} was trained in fp32")
            trials.append(("fp32", changed_plan(own, ReplayChange(layout=layout, precision="fp32"))))
        results = [_replayed(what, trial, own) for what, trial in trials]
    except (RecipeError, CheckError) as error:
        raise UsageError(str(error)) from error
    return _judge(folder, plan, logged, results)


def _replayed(what: str, trial: ReplayPlan, own: ReplayPlan) -> Replayed:
    steps = compute(trial)[0].steps
    alike = what == "same batch" and (trial.layout, trial.world_size) == (own.layout, own.world_size)
    return Replayed(what, [s.record["loss"] for s in steps], [s.record["grad_norm"] for s in steps], alike)


def _judge(folder: Path, plan: ReplayPlan, logged_steps: LoggedSteps, results: list[Replayed]) -> dict[str, Any]:
    step, same = plan.last_step, results[0]
    different = _differences(logged_steps, same)
    judged = {at: d for at, d in different.items() if same.bitwise_comparable or d > ROUNDING}
    usual, spread = _usual_loss(folder, step)
    logged = logged_steps.records[step]
    excess = logged["loss"] - usual
    verdicts = [_reproduced(judged, step, plan, same.bitwise_comparable)]
    for other in results[1:]:
        if not excess > STANDS_OUT * spread:
            verdicts.append(f"{other.what}: the loss of this step is as usual: there is no excess to go away")
            continue
        left = (other.losses[-1] - usual) / excess
        verdicts.append(_CONCLUSIONS[other.what, left < GONE].format(left=left, loss=other.losses[-1], excess=excess))
    return {
        "run": str(folder),
        "step": step,
        "checkpoint": plan.checkpoint or plan.come_from,
        "ranks": plan.world_size,
        "usual_loss": usual,
        "logged": {"loss": logged["loss"], "grad_norm": logged["grad_norm"]},
        "replayed": {r.what: {"loss": r.losses[-1], "grad_norm": r.grad_norms[-1]} for r in results},
        "bitwise": same.bitwise_comparable and not different,
        "reproducible": not any(d > ROUNDING for d in different.values()),
        "first_different_step": min(judged, default=None),
        "verdicts": verdicts,
    }


def _differences(logged: LoggedSteps, same: Replayed) -> dict[int, float]:
    """Return step -> largest relative difference of loss and gradient norm from the log, for steps that differ."""
    found = {}
    for record, loss, norm in zip(logged.records.values(), same.losses, same.grad_norms, strict=True):
        difference = max(relative(record["loss"], loss), relative(record["grad_norm"], norm))
        if difference:
            found[record["step"]] = difference
    return found


_CONCLUSIONS = {
    ("other batch", True): "goes away with another batch (loss {loss:.4f}): the data of this step",
    ("other batch", False): "stays with another batch (loss {loss:.4f}, {left:.0%} of the excess of {excess:+.3f}): not the data "
    "of this step, but the weights and the optimizer's state before it",
    ("fp32", True): "goes away in fp32 (loss {loss:.4f}): precision",
    ("fp32", False): "stays in fp32 (loss {loss:.4f}, {left:.0%} of the excess of {excess:+.3f}): not precision",
}


def _reproduced(different: dict[int, float], step: int, plan: ReplayPlan, bitwise: bool) -> str:
    first = plan.first_step
    if not different:
        how = "bit for bit" if bitwise else f"to {ROUNDING:g} (another layout than the run's: not bitwise)"
        return f"reproducible: steps {first} to {step} are {how} as logged; data or dynamics, not hardware"
    at, most = min(different), max(different.values())
    source = f"what {plan.come_from}, the data and the schedule give"
    if most <= ROUNDING:
        return (
            f"reproducible to rounding, not bit for bit: from step {at} on the log differs by up to {most:.1e} from {source}; "
            "nondeterministic kernels or another version of a library explain that"
        )
    return (
        f"not reproducible: step {at} is the first whose loss or gradient norm is not {source} (by {different[at]:.1e}, later up "
        f"to {most:.1e}); hardware suspect, or code, data or versions changed since the run"
    )


def _usual_loss(folder: Path, step: int) -> tuple[float, float]:
    """Return (this step's loss without an event, as extrapolated from the steps before, and their robust spread)."""
    records = [r for r in read_metrics(folder) if "loss" in r and r["step"] <= step]
    steps, losses = np.array([r["step"] for r in records]), np.array([float(r["loss"]) for r in records])
    return expected(steps, losses, len(steps) - 1)


def _report(found: dict[str, Any]) -> str:
    logged = found["logged"]
    rows = [["logged", f"{logged['loss']:.9g}", f"{logged['grad_norm']:.9g}"]]
    rows += [[what, f"{r['loss']:.9g}", f"{r['grad_norm']:.9g}"] for what, r in found["replayed"].items()]
    where = f"step {found['step']} from {found['checkpoint']} on {found['ranks']} ranks; usual loss {found['usual_loss']:.4f}"
    return "\n".join([where, table(rows, ["", "loss", "gradient norm"]), *found["verdicts"]])
