"""`search RECIPE --gpus N --gpu-type T`: ranks every layout, and says why the others cannot run."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from recipes.common.checks.model_checks import config_problems, count_problem, value_problems
from recipes.common.checks.recipe_checks import range_problems
from recipes.common.config.ds_config import load_ds_config
from recipes.common.config.field_types import type_problems
from recipes.common.recipe import PIPELINE_SCHEDULES, SLICES, Layout, Recipe, RecipeError
from tools.common.console import FAILED, GOOD, UsageError, quiet_transformers, table, tell_notes
from tools.common.devices import DEVICES, GIB, Device, find_device
from tools.common.recipe_io import load_recipe
from tools.plan.bubbles import bubble_text
from tools.plan.coefficients import Coefficients, first_principles, read_coefficients
from tools.plan.evaluate import Plan, Rejected, candidates, judge
from tools.plan.longest import find_longest, longest_json, longest_text
from tools.plan.model_cases import Candidate, ModelFacts, read_model

RECIPE_HELP = "a recipe file; its batch, schedule and ds_config count, its layouts do not"
PART_NAMES = {
    "matrices": "matrix products", "attention": "attention", "elementwise": "memory traffic", "host": "kernel launches",
    "head": "head", "loss": "loss", "gradients": "gradient sums", "tensor": "tensor all-reduce",
    "context": "context all-to-all", "expert": "expert all-to-all", "pipeline": "between stages", "bubble": "bubble",
    "data": "data reduction", "optimizer": "optimizer", "other": "other",
}  # fmt: skip


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help=RECIPE_HELP)
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs of the run")
    parser.add_argument("--top", type=int, default=10, help="layouts to print (default: %(default)s; --json has all)")
    parser.add_argument("--longest", action="store_true", help="double the sequence until no layout fits, and show each's best")
    add_model_flags(parser)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `read` reads."""
    parser.add_argument("--gpu-type", required=True, help=f"one of {', '.join(device.name for device in DEVICES)}")
    parser.add_argument("--price-per-hour", type=float, metavar="DOLLARS", help="a GPU hour (default: a round figure)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--calibration", type=Path, metavar="FILE", help="what `calibrate` wrote (default: the shipped fit)")
    source.add_argument("--first-principles", action="store_true", help="no fit at all: data sheets and formulas")


def run(flags: argparse.Namespace) -> int:
    facts, device, coefficients, price = read(flags.recipe, flags)
    if flags.gpus < 1:
        raise UsageError(f"--gpus={flags.gpus}: must be 1 or more")
    if flags.top < 0:
        raise UsageError(f"--top={flags.top}: must be 0 or more")
    if flags.longest:
        lengths = find_longest(facts, flags.gpus, device, coefficients, price)
        print(longest_json(lengths) if flags.json else longest_text(facts, flags.gpus, device, lengths))
        return GOOD if lengths else FAILED
    found = candidates(facts, flags.gpus, device)
    started = time.perf_counter()
    plans, rejected = judge(facts, found, device, coefficients, price)
    seconds = time.perf_counter() - started
    if flags.json:
        print(json.dumps({
            "recipe": facts.recipe.name, "gpus": flags.gpus, "gpu_type": device.name, "layouts": len(found),
            "seconds": seconds, "coefficients": coefficients.provenance, "ranked": [plan_json(plan) for plan in plans],
            "rejected": [candidate_json(r.candidate) | {"why": r.why} for r in rejected],
        }))  # fmt: skip
    else:
        print(_search_text(facts, device, flags.top, plans, rejected, coefficients))
        print(f"{len(found)} layouts in {seconds:.2f} s")
    return GOOD if plans else FAILED


def read(path: str, flags: argparse.Namespace) -> tuple[ModelFacts, Device, Coefficients, float]:
    """Return what the recipe at `path` and the flags say. Raises RecipeError or UsageError."""
    quiet_transformers()
    device = find_device(flags.gpu_type)
    coefficients = first_principles() if flags.first_principles else read_coefficients(flags.calibration)
    price = device.price if flags.price_per_hour is None else flags.price_per_hour
    if not 0 <= price < math.inf:
        raise UsageError(f"--price-per-hour={price}: must be a number from 0")
    made_on = coefficients.provenance.get("calibrated on", device.name)
    if made_on != device.name:
        tell_notes([f"{flags.calibration} was calibrated on {made_on}: it says little of --gpu-type={device.name}"])
    recipe = load_sound(path)
    facts = read_model(recipe, load_ds_config(recipe.deepspeed))
    if problem := count_problem(recipe, facts.causal):
        tell_notes([problem])  # whoever looks for a shape has not counted it yet
    return facts, device, coefficients, price


def load_sound(path: str) -> Recipe:
    """Return the recipe at `path`. Raises RecipeError with all its values that no model or run can have."""
    recipe = load_recipe(path)
    problems = type_problems(recipe) or range_problems(recipe) + config_problems(recipe.model) + value_problems(recipe.model)
    if problems:
        raise RecipeError(f"recipe {recipe.name!r}", problems)
    return recipe


def options_of(layout: Layout) -> str:
    """Return the layout's options beside its sizes, as a recipe writes them."""
    said = [f"recompute={layout.recompute}"] if layout.recompute != "none" else []
    said += [f"recompute_every={layout.recompute_every}"] if layout.recompute_every > 1 else []
    said += [f"context={layout.context}"] if layout.context > 1 else []
    said += [f"context_heads={layout.context_heads}"] if layout.context_heads else []
    said += [f"expert={layout.expert}"] if layout.expert > 1 else []
    said += [f"experts={layout.experts}"] if layout.experts != SLICES else []
    said += ["offload_activations"] if layout.offload_activations else []
    said += [f"mlp_chunk_tokens={layout.mlp_chunk_tokens}"] if layout.mlp_chunk_tokens else []
    said += ["sequence_parallel"] if layout.sequence_parallel else []
    said += [layout.pipeline_schedule] if layout.pipeline_schedule != PIPELINE_SCHEDULES[0] else []
    return " ".join(said + ([f"chunks={layout.chunks}"] if layout.chunks > 1 else []))


def name_of(candidate: Candidate) -> str:
    layout = candidate.layout
    sizes = f"tensor={layout.tensor} pipeline={layout.pipeline} data={candidate.data} micro_seqs={candidate.micro_seqs}"
    return f"{sizes} {options_of(layout)}".rstrip()


def candidate_json(candidate: Candidate) -> dict[str, Any]:
    return {**vars(candidate.layout), "data": candidate.data, "micro_seqs": candidate.micro_seqs}


def plan_json(plan: Plan) -> dict[str, Any]:
    low, peak, high = plan.peak
    stages = [
        vars(stage) | {"driver_bytes": float(total)} for stage, total in zip(plan.memory.stages, plan.stage_bytes, strict=True)
    ]
    return candidate_json(plan.candidate) | {
        "safe": plan.safe, "seconds": plan.seconds, "tokens_per_second": plan.tokens_per_second, "mfu": plan.mfu,
        "days": plan.days, "cost": plan.cost, "energy_kwh": plan.energy, "parts": plan.parts,
        "memory": {"peak": peak, "low": low, "high": high, "capacity": plan.memory.capacity,
                   "margin": plan.memory.capacity - peak, "libraries": plan.memory.libraries, "stages": stages},
    }  # fmt: skip


def _search_text(
    facts: ModelFacts, device: Device, top: int, plans: list[Plan], rejected: list[Rejected], coefficients: Coefficients
) -> str:
    lines = []
    if plans:
        header = ["", "tensor", "pipeline", "data", "micro_seqs", "options", "step s", "tokens/s", "MFU", "memory GiB", "days",
                  "cost $"]  # fmt: skip
        rows = [[rank, *_row(plan)] for rank, plan in enumerate(plans[:top], start=1)]
        lines += [table(rows, header)]
        if not plans[0].safe:
            lines.append(
                f"! may run out of memory: every layout's interval (nine of ten) reaches the GPU's {device.memory / GIB:.0f} GiB"
            )
        elif any(not plan.safe for plan in plans[:top]):
            lines.append("! may run out of memory: the interval (nine of ten) reaches the GPU's")
        lines += ["", f"the first: {name_of(plans[0].candidate)}", plan_text(plans[0]), bubble_text(facts, plans[0]), ""]
    else:
        lines.append(f"{facts.recipe.name}: no layout fits")
    lines += [_why_nots(rejected), source_text(coefficients)]
    return "\n".join(lines)


def _row(plan: Plan) -> list[object]:
    layout = plan.candidate.layout
    low, peak, high = (size / GIB for size in plan.peak)
    return [
        layout.tensor, layout.pipeline, plan.candidate.data, plan.candidate.micro_seqs, options_of(layout), f"{plan.seconds:.3f}",
        f"{plan.tokens_per_second:,.0f}", f"{plan.mfu:.1%}", f"{peak:.0f} ({low:.0f}-{high:.0f}){'' if plan.safe else ' !'}",
        f"{plan.days:.1f}", f"{plan.cost:,.0f}",
    ]  # fmt: skip


def plan_text(plan: Plan) -> str:
    """Format memory by stage and class, the step's time by part, and the run's length and cost."""
    rows = []
    for index, (stage, total) in enumerate(zip(plan.memory.stages, plan.stage_bytes, strict=True)):
        classes = (
            stage.weights,
            stage.gradients,
            stage.optimizer,
            stage.stored,
            stage.working,
            stage.loss,
            plan.memory.libraries,
        )
        margin = plan.memory.capacity - total
        rows.append(
            [index, stage.in_flight, *(f"{size / GIB:.2f}" for size in classes), f"{total / GIB:.1f}", f"{margin / GIB:.1f}"]
        )
    header = [
        "stage",
        "in flight",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "one layer",
        "loss",
        "libraries",
        "driver",
        "margin",
    ]
    low, _, high = plan.peak
    parts = sorted(plan.parts.items(), key=lambda part: -part[1])
    shares = [[PART_NAMES[name], f"{seconds:.4f}", f"{seconds / plan.seconds:.1%}"] for name, seconds in parts if seconds > 0]
    return "\n".join([
        "memory, GiB a GPU (driver: including unused memory that the allocator holds; margin: what is left)", table(rows, header),
        f"nine of ten: {low / GIB:.1f} to {high / GIB:.1f} of {plan.memory.capacity / GIB:.1f} GiB on the fullest stage",
        f"time, {plan.seconds:.3f} s a step", table(shares, ["part", "seconds", "share"]),
        f"{plan.tokens_per_second:,.0f} tokens/s, MFU {plan.mfu:.1%}, the run {plan.days:.1f} days, ${plan.cost:,.0f}, "
        f"{plan.energy:,.0f} kWh at the GPUs",
    ])  # fmt: skip


def _why_nots(rejected: list[Rejected]) -> str:
    """Format the rejected layouts by reason, one line each; all that lack memory share one."""
    groups: dict[str, list[Candidate]] = defaultdict(list)
    for entry in rejected:
        kind = "memory" if entry.why.startswith("memory: ") else entry.why
        groups[kind].append(entry.candidate)
    examples = {("memory" if e.why.startswith("memory: ") else e.why): e for e in reversed(rejected)}
    lines = [f"not possible: {len(rejected)} layouts (each with its reason in --json)"] if rejected else []
    for kind, found in sorted(groups.items(), key=lambda group: -len(group[1])):
        example = examples[kind]
        lines.append(f"  {len(found):>5}  {example.why}" + (f"; first {name_of(example.candidate)}" if len(found) > 1 else ""))
    return "\n".join(lines)


def source_text(coefficients: Coefficients) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in coefficients.provenance.items() if key != "command")
    return f"terms {facts}; nine of ten step times within {coefficients.time_spread:.0%}"
