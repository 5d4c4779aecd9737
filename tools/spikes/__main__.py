"""Finds, explains and undoes loss spikes, in our runs and in other programs' logs.

    python -m tools.spikes scan train.log                 # every event: class, onset, peak, which signal moved first
    python -m tools.spikes explain runs/llama_8b 12340    # ranked causes, the evidence for and against each
    python -m tools.spikes batch runs/llama_8b 12340      # what the step read: documents, loss of each sequence, repeats
    python -m tools.spikes compare runs/a runs/b          # the same steps in two runs with one data order: the data
    python -m tools.spikes replay runs/llama_8b 12340     # the same batch again, another batch, in fp32
    python -m tools.spikes plan-rewind runs/llama_8b 12340
    python -m tools.spikes report runs/llama_8b           # one HTML file, works offline

RUN is a run directory, EVENT the step that `scan` prints as its onset. Only `replay` can use a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.common.verbs import Verb, run_tool

VERBS = {
    "scan": Verb("tools.spikes.scan", "list the events of logs: class, onset, peak, end, which signal moved first"),
    "explain": Verb("tools.spikes.explain", "rank the causes of an event, with the evidence for and against each"),
    "batch": Verb("tools.spikes.batch", "what a step read: documents, loss of each sequence, repeated n-grams"),
    "compare": Verb("tools.spikes.compare", "data or dynamics: do two runs with one data order spike at the same steps?"),
    "replay": Verb("tools.spikes.replay", "compute a step again from the checkpoint before it"),
    "plan-rewind": Verb("tools.spikes.plan_rewind", "which checkpoint to go back to, what to skip, what it costs"),
    "report": Verb("tools.spikes.report", "write one HTML file that works offline"),
}


def main(argv: list[str] | None = None) -> int:
    return run_tool("spikes", __doc__, VERBS, argv)


if __name__ == "__main__":
    sys.exit(main())
