"""Checks that a recipe, in a layout and with the installed versions, trains exactly what plain transformers trains.

    python -m tools.verify recipes/llama_1b.py --layout tensor=2,pipeline=2,data=2
    python -m tools.verify --family bloom,falcon              # tiny models of these types, in stages, sharded, and both
    python -m tools.verify --family all --log families.jsonl --table recipes/FAMILIES.md

Shrinks the recipe's own model (same family, same options), trains a few steps in the layout and in one process with plain
transformers, and prints the largest differences in loss, gradient norm, gradients and parameters, by parameter name. Gradients
come from a step of plain SGD without clipping, because Adam and clipping hide a wrong scale. What rounding alone changes is
measured on the same small model, and a few times that is allowed. Exits 1 beyond it. With precision="fp8" the oracle's
products are in fp8 too, by their definition, and a row more compares their gradients.

--family does the same for a tiny model of each causal type of the installed transformers, from its default configuration. A type
that is refused by name, or is no decoder of text alone, is told with the reason; only one that trains wrongly exits 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from tools/
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.common.console import FAILED, GOOD, CheckError, UsageError, exit_code, quiet_transformers
from tools.common.forked_ranks import RankError
from tools.common.recipe_io import load_recipe, parse_layout
from tools.verify.family_log import FamilyLog
from tools.verify.family_table import as_text, write_page
from tools.verify.family_verdict import failed

with redirect_stdout(sys.stderr):  # DeepSpeed logs on what is stdout when it is imported
    from tools.verify.families import LAYOUTS, judge_families
    from tools.verify.gate import gate_table, make_trial, verify

DEFAULT_LAYOUT = "tensor=2,pipeline=2,data=2"


def main(argv: list[str] | None = None) -> int:
    flags = _parse_flags(argv)
    return exit_code(lambda: _run_families(flags) if flags.family else _run(flags))


def _run(flags: argparse.Namespace) -> int:
    quiet_transformers()
    recipe, words = load_recipe(flags.recipe), flags.layout or DEFAULT_LAYOUT
    layout, data = parse_layout(words)
    trial = make_trial(recipe, layout, data, steps=flags.steps, seq_len=flags.seq_len, device=flags.device,
                       any_release=flags.any_release)  # fmt: skip
    try:
        rows = verify(trial)
    except (RankError, AssertionError) as error:
        raise CheckError(f"the layout could not be trained: {error}") from error
    passed = all(row.passed for row in rows)
    if flags.json:
        print(json.dumps({"recipe": recipe.name, "layout": words, "passed": passed, "rows": [asdict(r) for r in rows]}))
    else:
        print(gate_table(recipe.name, trial, rows))
    return GOOD if passed else FAILED


def _run_families(flags: argparse.Namespace) -> int:
    quiet_transformers()
    if flags.table and flags.layout:
        raise UsageError("--table: the page has all layouts beside each other; leave out --layout")
    layouts = {flags.layout: parse_layout(flags.layout)} if flags.layout else LAYOUTS
    log = FamilyLog(flags.log)
    names = None if flags.family == "all" else flags.family.split(",")
    verdicts = judge_families(names, layouts, log, steps=flags.steps, seq_len=flags.seq_len)
    wrong = any(failed(verdict) for verdict in verdicts)
    if flags.json:
        print(json.dumps({"passed": not wrong, "verdicts": [asdict(verdict) for verdict in verdicts]}))
    else:
        print(as_text(verdicts))
    if flags.table:
        write_page(flags.table, verdicts)
    return FAILED if wrong else GOOD


def _parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a recipe file")
    parser.add_argument("--family", metavar="NAME,... | all", help="causal model types of transformers, in place of a recipe")
    parser.add_argument("--layout", help=f"sizes left out are 1 (default: {DEFAULT_LAYOUT}; of families: {', '.join(LAYOUTS)})")
    parser.add_argument("--steps", type=int, default=3, help="training steps (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=32, help="tokens in a sequence (default: %(default)s)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda needs one GPU a rank (default: %(default)s)"
    )
    parser.add_argument("--log", type=Path, metavar="FILE", help="with --family: note each verdict there, and continue from it")
    parser.add_argument("--table", type=Path, metavar="FILE", help="with --family: write the page of families there")
    parser.add_argument(
        "--any-release",
        action="store_true",
        help="try also releases of DeepSpeed and torch that a run refuses, to find which of them train wrongly",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else")
    flags = parser.parse_args(argv)
    if (flags.recipe is None) == (flags.family is None):
        parser.error("give a RECIPE or --family, one of them")
    if flags.recipe and (flags.log or flags.table):
        parser.error("--log and --table go with --family")
    if flags.family and (flags.device != "cpu" or flags.any_release):
        parser.error("--device and --any-release go with a RECIPE")
    return flags


if __name__ == "__main__":
    sys.exit(main())
