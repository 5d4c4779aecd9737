"""`layouts RECIPE... --gpu-type T`: plans the layouts that recipes state, and writes the sentence of a recipe's docstring."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass

from recipes.common.checks.recipe_checks import layout_problems
from recipes.common.recipe import Layout, RecipeError
from tools.common.console import FAILED, GOOD, table
from tools.common.devices import GIB, Device
from tools.plan.coefficients import Coefficients
from tools.plan.evaluate import Plan, judge
from tools.plan.model_cases import Candidate, ModelFacts
from tools.plan.search import add_model_flags, options_of, plan_json, read


@dataclass(frozen=True)
class Planned:
    """A recipe's layout at its number of GPUs: its plan, or why it cannot run."""

    gpus: int
    layout: Layout
    plan: Plan | None
    why: str = ""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help="recipe files")
    add_model_flags(parser)


def run(flags: argparse.Namespace) -> int:
    objects, texts, runs = [], [], True
    for path in flags.recipes:
        facts, device, coefficients, price = read(path, flags)
        if not facts.recipe.layouts:
            raise RecipeError(f"recipe {facts.recipe.name!r}", ["layouts={} has none to plan; add one, or use `plan search`"])
        found = plan_layouts(facts, device, coefficients, price)
        runs = runs and all(entry.plan and entry.plan.safe for entry in found)
        said = sentence(found, device)
        plans = [{"gpus": e.gpus, "why": e.why} | (plan_json(e.plan) if e.plan else {}) for e in found]
        objects.append({"recipe": facts.recipe.name, "sentence": said, "layouts": plans})
        header = ["GPUs", "tensor", "pipeline", "options", "step s", "memory GiB", "MFU", "days"]
        texts.append(f"{facts.recipe.name} on {device.name}\n{table([_row(e) for e in found], header)}\n{said}")
    print(json.dumps({"gpu_type": device.name, "recipes": objects}) if flags.json else "\n\n".join(texts))
    return GOOD if runs else FAILED


def plan_layouts(facts: ModelFacts, device: Device, coefficients: Coefficients, price: float) -> list[Planned]:
    """Plan each layout of the recipe with the recipe's own micro batch."""
    found, wrong = {}, {}
    for gpus, layout in facts.recipe.layouts.items():
        if problems := layout_problems(facts.recipe, layout, gpus):
            wrong[gpus] = problems[0]
            continue
        data = gpus // (layout.tensor * layout.pipeline)
        found[gpus] = Candidate(layout=layout, data=data, micro_seqs=facts.recipe.batch.micro_seqs)
    plans, rejected = judge(facts, list(found.values()), device, coefficients, price)  # all at once: they share trials
    planned = {plan.candidate: plan for plan in plans}
    whys = {entry.candidate: entry.why for entry in rejected}
    able = {gpus: (planned.get(each), whys.get(each, "")) for gpus, each in found.items()}
    return [Planned(gpus, layout, *(able.get(gpus) or (None, wrong[gpus]))) for gpus, layout in facts.recipe.layouts.items()]


def sentence(found: Sequence[Planned], device: Device) -> str:
    """Return the sentence for a recipe's docstring: memory of the emptiest and the fullest stage, MFU, length of the run."""
    parts = []
    for entry in found:
        if entry.plan is None:
            parts.append(f"{_gpus(entry)} cannot run it")
            continue
        doubt = "" if entry.plan.safe else " (may run out)"
        parts.append(f"{_gpus(entry)} {_memory(entry.plan)} GiB{doubt}, MFU {entry.plan.mfu:.0%}, {_length(entry.plan.days)}")
    return f"Planned ({device.name}, not measured; memory a GPU over the stages): {'; '.join(parts)}."


def _gpus(entry: Planned) -> str:
    return f"{entry.gpus} GPU{'s' if entry.gpus > 1 else ''}"


def _memory(plan: Plan) -> str:
    low, high = (round(float(size) / GIB) for size in (plan.stage_bytes.min(), plan.stage_bytes.max()))
    return f"{high}" if low == high else f"{low} to {high}"


def _length(days: float) -> str:
    number, unit = (days, "days") if days >= 1 else (24 * days, "hours")
    return f"{number:,.0f} {unit}" if number >= 10 else f"{number:.1f} {unit}"


def _row(entry: Planned) -> list[object]:
    words = [entry.gpus, entry.layout.tensor, entry.layout.pipeline, options_of(entry.layout)]
    if entry.plan is None:
        return [*words, "", entry.why, "", ""]
    memory = _memory(entry.plan) + ("" if entry.plan.safe else " !")
    return [*words, f"{entry.plan.seconds:.3f}", memory, f"{entry.plan.mfu:.1%}", f"{entry.plan.days:.2f}"]
