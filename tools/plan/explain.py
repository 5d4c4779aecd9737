"""`explain LAYOUT RECIPE --gpu-type T`: shows where the memory and time of one layout go."""

from __future__ import annotations

import argparse
import json

from tools.common.console import FAILED, GOOD, UsageError
from tools.common.recipe_io import parse_layout
from tools.plan.bubbles import bubble_shares, bubble_text
from tools.plan.evaluate import judge
from tools.plan.model_cases import Candidate
from tools.plan.search import RECIPE_HELP, add_model_flags, candidate_json, name_of, plan_json, plan_text, read, source_text


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("layout", metavar="LAYOUT", help="tensor=2,pipeline=4,data=8,recompute=full; sizes left out are 1")
    parser.add_argument("recipe", metavar="RECIPE", help=RECIPE_HELP)
    parser.add_argument("--micro-seqs", type=int, help="sequences in a micro batch (default: the recipe's)")
    add_model_flags(parser)


def run(flags: argparse.Namespace) -> int:
    facts, device, coefficients, price = read(flags.recipe, flags)
    layout, data = parse_layout(flags.layout)
    micro_seqs = facts.recipe.batch.micro_seqs if flags.micro_seqs is None else flags.micro_seqs
    if micro_seqs < 1:
        raise UsageError(f"--micro-seqs={micro_seqs}: must be 1 or more")
    candidate = Candidate(layout=layout, data=data, micro_seqs=micro_seqs)
    plans, rejected = judge(facts, [candidate], device, coefficients, price)
    if flags.json:
        found = {
            "ranked": [plan_json(plan) for plan in plans],
            "rejected": [candidate_json(candidate) | {"why": r.why} for r in rejected],
            "bubble": bubble_shares(facts, plans[0]) if plans else None,  # by formula, simulated
        }
        print(json.dumps({"recipe": facts.recipe.name, "gpu_type": device.name} | found))
    elif rejected:
        print(f"{name_of(candidate)} on {candidate.gpus} {device.name}: cannot run\n  {rejected[0].why}")
    else:
        print(f"{facts.recipe.name}, {name_of(candidate)} on {candidate.gpus} {device.name}\n{plan_text(plans[0])}")
        print(bubble_text(facts, plans[0]))
        print(source_text(coefficients))
    return GOOD if plans else FAILED
