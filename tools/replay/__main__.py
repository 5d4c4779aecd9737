"""Computes a step of a run again, and says whether it is what the run logged, or which quantity and which tensor differ first.

    python -m tools.replay runs/llama_8b --step 12340                           # as the run did it: bit for bit the same?
    python -m tools.replay runs/llama_8b --step 12340 --layout tensor=2,data=2  # in another layout: the same but for rounding?
    python -m tools.replay runs/llama_8b --step 12340 --set optimizer.clip=0.5  # with one thing changed: what differs first?
    python -m tools.replay runs/llama_8b --step 12340 --versions deepspeed=0.19.5
    python -m tools.replay runs/llama_8b --against runs/other                   # two runs: down to the first tensor that differs
    python -m tools.replay runs/llama_8b --step 12340 --set model.rms_norm_eps=1e-6 --against    # the same for a change
    python -m tools.replay --bisect deepspeed=0.18.2..0.19.8                    # which release changed what DeepSpeed trains?

The step is computed from the checkpoint before it, or from the initial weights, with the training code itself. Nothing is written
into a run, which may be alive. Exit 0: equal, bit for bit or within rounding; 1: something differs; 2: wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.common.console import GOOD, UsageError, exit_code, quiet_transformers
from tools.replay.bisection import add_bisect_flags, run_bisect


def main(argv: list[str] | None = None) -> int:
    flags = _parse_flags(argv)
    return exit_code(lambda: _run(flags))


def _run(flags: argparse.Namespace) -> int:
    if flags.bisect is not None:
        return run_bisect(flags)
    if flags.everything or flags.bits or flags.ask is not None or flags.jobs != 1:
        raise UsageError("--all, --bits, --ask and --jobs say how to bisect; name the releases with --bisect PACKAGE=FIRST..LAST")
    if flags.run is None:
        raise UsageError("RUN is missing: the run whose step is to be computed again")
    with redirect_stdout(sys.stderr):  # DeepSpeed logs on what is stdout when it is imported
        from tools.replay import run
    quiet_transformers()
    with redirect_stdout(sys.stderr):
        found = run.replay(flags)
    print(json.dumps(found.to_json()) if flags.json else found.text())
    return GOOD if found.is_equal else 1


def _parse_flags(argv: list[str] | None) -> argparse.Namespace:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tools.replay", description=__doc__, formatter_class=as_written)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", nargs="?", help="a run directory; with --bisect it may be a recipe, or left out")
    add(
        "--step",
        type=int,
        metavar="N",
        help="counts from 1, as in metrics.jsonl; all steps since the checkpoint before it are computed (with --against RUN_B it "
        "may be left out: the last that both have)",
    )
    add("--layout", metavar="tensor=2,data=2", help="default: the run's own, or one process if it had over 8 ranks")
    add("--precision", choices=("fp32", "bf16", "fp16"), help="default: the run's own")
    add(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        dest="fields",
        help="change a field of the recipe or of its ds_config, such as optimizer.clip=0.5",
    )
    add(
        "--without",
        action="append",
        default=[],
        metavar="START:STOP",
        help="leave these sequences out, as numbered by `spikes batch`; those that follow move up",
    )
    add(
        "--versions",
        action="append",
        default=[],
        metavar="PACKAGE=VERSION",
        help="with this release, which is installed once into a folder of its own",
    )
    add(
        "--against",
        nargs="?",
        const="",
        metavar="RUN_B",
        help="go down to the first tensor that differs between the two runs; without RUN_B: between the run and the change that "
        "the other flags make",
    )
    add_bisect_flags(parser)
    add("--json", action="store_true", help="print one JSON object on stdout and nothing else")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
