"""Which layout, before any GPU is booked: memory and time of every layout, the best ones, and why not the others.

python -m tools.plan search recipes/llama_1b.py --gpus 64 --gpu-type H100
python -m tools.plan explain tensor=2,pipeline=4,data=8 recipes/llama_1b.py --gpu-type H100
python -m tools.plan layouts recipes/llama_1b.py --gpu-type H100                      # those that the recipe states
python -m tools.plan calibrate recipes/llama_1b.py --gpu-type H100 --out h100.json    # two short runs on this machine
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse

from recipes.common.recipe import RecipeError
from tools.common.console import UsageError, exit_code
from tools.common.devices import DEVICES
from tools.plan import calibrate, layouts, search


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.plan", description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        added.add_argument("--json", action="store_true", help="print one JSON object")
        return added

    def model(added: argparse.ArgumentParser) -> None:
        added.add_argument("--gpu-type", required=True, help=f"one of {', '.join(device.name for device in DEVICES)}")
        added.add_argument("--price-per-hour", type=float, metavar="DOLLARS", help="a GPU hour (default: a round figure)")
        source = added.add_mutually_exclusive_group()
        source.add_argument("--calibration", type=Path, metavar="FILE", help="what `calibrate` wrote (default: the shipped fit)")
        source.add_argument("--first-principles", action="store_true", help="no fit at all: data sheets and formulas")

    def recipe(added: argparse.ArgumentParser) -> None:
        added.add_argument(
            "recipe", metavar="RECIPE", help="a recipe file; its batch, schedule and ds_config count, its layouts do not"
        )
        model(added)

    ranked = verb("search", "rank every layout on N GPUs, and say why not of those that cannot run")
    recipe(ranked)
    ranked.add_argument("--gpus", type=int, required=True, metavar="N")
    ranked.add_argument("--top", type=int, default=10, help="layouts to print (default: %(default)s; --json has all)")
    one = verb("explain", "where memory and time of one layout go")
    one.add_argument("layout", metavar="LAYOUT", help="tensor=2,pipeline=4,data=8,recompute=full; sizes left out are 1")
    recipe(one)
    one.add_argument("--micro-seqs", type=int, help="sequences in a micro batch (default: the recipe's)")
    own = verb("layouts", "the layouts that recipes state; exit 1 when one may not fit")
    own.add_argument("recipes", nargs="+", metavar="RECIPE", help="recipe files")
    model(own)
    short = verb("calibrate", "two short runs on this machine, and the terms that explain them")
    short.add_argument("recipe", metavar="RECIPE", help="a recipe file")
    short.add_argument("--gpu-type", required=True, help="what this machine has (CPU where there is no GPU)")
    short.add_argument("--layout", default="tensor=1", help="as for `explain`; as many ranks as that are run (default: one)")
    short.add_argument("--layers", type=int, help="run only the first layers of the model (default: all)")
    short.add_argument("--steps", type=int, default=5, help="timed steps of each run (default: %(default)s)")
    short.add_argument("--out", type=Path, required=True, metavar="FILE")
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
    "search": search.search,
    "explain": search.explain,
    "layouts": layouts.run,
    "calibrate": calibrate.run,
}

if __name__ == "__main__":
    sys.exit(main())
