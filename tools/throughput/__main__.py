"""Where the time of a step goes, and what a step costs.

python -m tools.throughput flops recipes/llama_1b.py      # FLOPs a token, by every convention in use
python -m tools.throughput flops --published              # nine published figures from the same formulas
python -m tools.throughput goodput RUN                    # how much of a run's time trained, and what took the rest
python -m tools.throughput run recipes/quickstart.py --layout pipeline=2       # timed steps here, then the report
python -m tools.throughput report RUN                     # each rank's parts, communication, bubble, stages, slow ranks
python -m tools.throughput diff RUN_A RUN_B               # which parts made the difference
python -m tools.throughput schedules                      # pipeline schedules against 1F1B: step time and bubble, measured here
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse

from recipes.common.recipe import RecipeError
from tools.common.console import UsageError, exit_code
from tools.throughput import diff, flops, goodput, measure, report
from tools.throughput import schedules as bench_schedules


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.throughput", description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    flops.add_flags(verbs)
    goodput.add_flags(verbs)
    measure.add_flags(verbs)
    report.add_flags(verbs)
    diff.add_flags(verbs)
    bench_schedules.add_flags(verbs)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    def work() -> int:
        try:
            return VERBS[args.verb](args)
        except RecipeError as error:
            raise UsageError(str(error)) from error

    return exit_code(work)


VERBS = {
    "flops": flops.run,
    "goodput": goodput.run,
    "schedules": bench_schedules.run,
    "run": measure.run,
    "report": report.run,
    "diff": diff.run,
}

if __name__ == "__main__":
    sys.exit(main())
