"""Predicts memory, time and cost of every layout before a GPU is booked.

python -m tools.plan search recipes/llama_1b.py --gpus 64 --gpu-type H100
python -m tools.plan explain tensor=2,pipeline=4,data=8 recipes/llama_1b.py --gpu-type H100
python -m tools.plan layouts recipes/llama_1b.py --gpu-type H100                      # those that the recipe states
python -m tools.plan rehearse recipes/llama_8b.py --gpus 8                            # one rank's real step, without a GPU
python -m tools.plan calibrate recipes/llama_1b.py --gpu-type H100 --out h100.json    # two short runs on this machine
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.common.verbs import Verb, run_tool

VERBS = {
    "search": Verb("tools.plan.search", "rank every layout on N GPUs, and say why the others cannot run"),
    "explain": Verb("tools.plan.explain", "where the memory and time of one layout go"),
    "layouts": Verb("tools.plan.layouts", "predict the layouts that recipes state; exit 1 if one may not fit"),
    "rehearse": Verb(
        "tools.plan.rehearse", "run one rank's real step here without a GPU, and count memory, kernels, waits, messages"
    ),
    "calibrate": Verb("tools.plan.calibrate", "measure two short runs on this machine and fit the planner to them"),
}


def main(argv: list[str] | None = None) -> int:
    return run_tool("plan", __doc__, VERBS, argv)


if __name__ == "__main__":
    sys.exit(main())
