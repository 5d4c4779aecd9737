"""Computes a plan in a process of its own, whose path has other releases of packages first: `tools.replay.compute` starts it."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path

with redirect_stdout(sys.stderr):  # DeepSpeed logs on what is stdout when it is imported
    from tools.replay.compute import compute_sent

if __name__ == "__main__":
    compute_sent(Path(sys.argv[1]), Path(sys.argv[2]))
