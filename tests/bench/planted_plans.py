"""Plants wrong entries in every tensor plan that is ours, a column called row, a missing sum, and counts how many are found.

    python -m tests.bench.planted_plans [FAMILY ...]

Exits 1 if one is not found, or if a plan as it is is not exact.
"""

import argparse
import sys

from recipes.common.parallel.tensor_plans import ADDED_TENSOR, BUILT_IN_TENSOR
from tests.support.planted_plans import SIZE, planted
from tools.common.console import UsageError, exit_code, quiet_transformers
from tools.common.forked_ranks import run_ranks


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.planted_plans", description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="a family with a plan of our own (default: all)")
    flags = parser.parse_args(argv)
    return exit_code(lambda: _run(flags.families))


def _run(families: list[str]) -> int:
    known = sorted({*BUILT_IN_TENSOR, *ADDED_TENSOR})
    if unknown := [family for family in families if family not in known]:
        raise UsageError(f"{', '.join(unknown)}: no tensor plan of our own. There are: {', '.join(known)}")
    quiet_transformers()
    entries, missed, inexact = 0, [], []
    for family in families or known:
        right, found = run_ranks(planted, SIZE, family)[0]
        entries += len(found)
        missed += [f"{family}: {entry}" for entry, caught in found.items() if not caught]
        inexact += [family] if not right < 1.0 else []
        print(f"{family:<20} {sum(found.values())} of {len(found)} found; as it is {right:.1e} of what is allowed", flush=True)
    print(
        f"{entries - len(missed)} of {entries} planted entries found",
        *missed,
        *(f"{each} is not exact" for each in inexact),
        sep="\n",
    )
    return 1 if missed or inexact else 0


if __name__ == "__main__":
    sys.exit(main())
