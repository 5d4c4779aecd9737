"""How fast a run is, and where its time goes.

    python -m tools.throughput goodput RUN
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository root, not from tools/throughput/
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.common.console import exit_code
from tools.throughput import goodput


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.throughput", description="How fast a run is, and where its time goes.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    goodput.add_flags(verbs.add_parser("goodput", help="of all the time since the first start, how much trained, and what took the rest"))
    flags = parser.parse_args()
    return flags.run(flags)


if __name__ == "__main__":
    sys.exit(exit_code(main))
