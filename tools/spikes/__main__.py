"""Find, explain and undo loss spikes, in our runs and in other programs' logs.

    python -m tools.spikes scan train.log                 # every event: class, onset, peak, which signal moved first
    python -m tools.spikes explain runs/llama_8b 12340    # ranked causes, the evidence for and against each
    python -m tools.spikes batch runs/llama_8b 12340      # what the step read: documents, loss of each sequence, repeats
    python -m tools.spikes compare runs/a runs/b          # the same steps in two runs with one data order: the data
    python -m tools.spikes replay runs/llama_8b 12340     # the same batch again, another batch, in fp32
    python -m tools.spikes plan-rewind runs/llama_8b 12340
    python -m tools.spikes report runs/llama_8b           # one HTML file, works offline

A RUN is a run directory, an EVENT the step that `scan` prints as its onset. Nothing here needs a GPU but `replay`.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import importlib

from tools.common.console import exit_code


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.spikes", description=(__doc__ or "").split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        added.add_argument("--json", action="store_true", help="print one JSON object")
        return added

    scan = verb("scan", "the events of logs: class, onset, peak, end, rise, which signal moved first and by how many steps")
    scan.add_argument("logs", type=Path, nargs="+", metavar="LOG", help="a run directory, a log, a CSV or TensorBoard events")

    explain = verb("explain", "ranked causes of an event, with the evidence for and against each")
    explain.add_argument("run", type=Path, metavar="RUN")
    explain.add_argument("event", metavar="EVENT", help="a step, or a black box of RUN/events")

    batch = verb("batch", "what a step read: documents, loss of each sequence, repeated n-grams")
    batch.add_argument("run", type=Path, metavar="RUN")
    batch.add_argument("step", type=int, metavar="STEP")
    batch.add_argument("--top", type=int, default=8, help="sequences to print, the worst (default: %(default)s; --json has all)")

    compare = verb("compare", "data or dynamics: do two runs with one data order spike at the same steps?")
    compare.add_argument("runs", type=Path, nargs=2, metavar="RUN")

    replay = verb("replay", "compute a step again from the checkpoint before it: same batch, another batch, in fp32")
    replay.add_argument("run", type=Path, metavar="RUN")
    replay.add_argument("step", type=int, metavar="STEP")
    replay.add_argument("--other-batch", action="store_true", help="also: another batch at that step")
    replay.add_argument("--fp32", action="store_true", help="also: all steps since the checkpoint in fp32")
    replay.add_argument("--layout", metavar="tensor=2,data=2", help="default: the run's own, or one process if it had over 8")

    rewind = verb("plan-rewind", "which checkpoint to go back to, what to skip, what it costs")
    rewind.add_argument("run", type=Path, metavar="RUN")
    rewind.add_argument("event", metavar="EVENT", help="a step, or a black box of RUN/events")
    rewind.add_argument("--margin-steps", type=int, help="leave out this many steps before the onset too (default: 1)")
    rewind.add_argument("--skip-steps", type=int, help="leave out this many steps in all (default: up to the peak)")

    report = verb("report", "one HTML file that works offline")
    report.add_argument("run", type=Path, metavar="RUN")
    report.add_argument("--out", type=Path, help="the file to write (default: RUN/spikes.html)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    flags = parse_args(argv)
    # one module a verb, imported when asked for: `scan` needs no torch, `replay` does
    module = importlib.import_module("tools.spikes." + flags.verb.replace("-", "_"))
    return exit_code(lambda: module.run(flags))


if __name__ == "__main__":
    sys.exit(main())
