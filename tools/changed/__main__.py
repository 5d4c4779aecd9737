"""Answers "what changed?": between two runs, or the segments of one.

    python -m tools.changed runs/a runs/b                 # every difference, by what it can change; where the numbers part
    python -m tools.changed runs/a:1 runs/a:2             # what a resume, a rewind or another layout changed
    python -m tools.changed runs/a train.log              # a log has numbers only
    python -m tools.changed lineage runs/a                # its starts, resumes and rewinds, and whether the chain is unbroken
    python -m tools.changed check runs/a                  # what is missing here to resume or replay it exactly

A run without a record, of an earlier version, is compared by the files that say what it is.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.common.verbs import Verb, run_tool

VERBS = {
    "show": Verb("tools.changed.show", "what differs between A and B (the word may be left out)"),
    "lineage": Verb(
        "tools.changed.lineage", "a run's starts, resumes, rewinds and layouts as a chain, and whether it is unbroken"
    ),
    "check": Verb("tools.changed.check", "what is missing here to resume or replay a run exactly"),
}


def main(argv: list[str] | None = None) -> int:
    return run_tool("changed", __doc__, VERBS, argv, default="show")


if __name__ == "__main__":
    sys.exit(main())
