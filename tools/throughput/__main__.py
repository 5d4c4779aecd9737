"""Reports where the time of a step goes, and what a step costs.

python -m tools.throughput flops recipes/llama_1b.py      # FLOPs a token, by every convention in use
python -m tools.throughput flops --published              # nine published figures from the same formulas
python -m tools.throughput goodput RUN                    # how much of a run's time trained, and what took the rest
python -m tools.throughput run recipes/quickstart.py --layout pipeline=2       # timed steps here, then the report
python -m tools.throughput report RUN                     # each rank's parts, communication, bubble, stages, slow ranks
python -m tools.throughput diff RUN_A RUN_B               # which parts made the difference
python -m tools.throughput schedules                      # pipeline schedules against 1F1B: step time and bubble
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.common.verbs import Verb, run_tool

VERBS = {
    "flops": Verb("tools.throughput.flops", "FLOPs a token by every convention in use"),
    "goodput": Verb("tools.throughput.goodput", "how much of a run's time trained, and what took the rest"),
    "run": Verb("tools.throughput.measure", "time some steps of a recipe on this machine, and report"),
    "report": Verb("tools.throughput.report", "where the time of a step went, by rank"),
    "diff": Verb("tools.throughput.diff", "which parts made the difference between two runs"),
    "schedules": Verb("tools.throughput.schedules", "step time and bubble of each pipeline schedule, measured here"),
}


def main(argv: list[str] | None = None) -> int:
    return run_tool("throughput", __doc__, VERBS, argv)


if __name__ == "__main__":
    sys.exit(main())
