"""Holds the planner's models to published measurements, and fits the coefficients that it ships with.

    python -m tests.bench.planner validate CSV...              # predict every measured row from the others of its table
    python -m tests.bench.planner fit CSV... --out FILE        # write the terms' values, as tools/plan/coefficients.json

A CSV has the columns of published_sample.csv (published runs, with their sources) or of vtrain_sample.csv (vTrain's tables).
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import argparse

from tests.bench.planner import fit, validate
from tools.common.console import exit_code


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.planner", description=(__doc__ or "").split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    helps = {
        "validate": "predict every row of published tables from the others, and print the errors by table",
        "fit": "write the terms' values from published tables",
    }
    added = {name: verbs.add_parser(name, help=text, description=text) for name, text in helps.items()}
    for parsed in added.values():
        parsed.add_argument("csv", type=Path, nargs="+", metavar="CSV", help="published runs, or one of vTrain's tables")
        parsed.add_argument("--json", action="store_true", help="print one JSON object on stdout, nothing else there")
    added["fit"].add_argument("--out", type=Path, required=True, metavar="FILE")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    flags = parse_args(argv)
    return exit_code(lambda: {"fit": fit.run, "validate": validate.run}[flags.verb](flags))


if __name__ == "__main__":
    sys.exit(main())
