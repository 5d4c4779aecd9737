"""Run a command in a process group of its own, and leave no process of that group behind.

    python tools/supervise/process_group.py COMMAND...      # launch/lib_group.sh calls it

On SIGTERM the single-node `deepspeed` runner exits alone and orphans its workers, which keep the GPUs. So the group gets SIGTERM,
that ranks may finish a checkpoint, and SIGKILL after STOP_SECONDS (60): when the command has ended, and when this program is
asked to end. Exit: the command's code; 143 after SIGTERM and SIGHUP, 130 after SIGINT.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

if not __package__:  # run as a script: import from the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from recipes.common.runtime.processes import is_unended_child, living_members, signal_child

_POLL_SECONDS = 0.05


def main() -> int:
    asked: list[int] = []
    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup it stays ignored
        numbers.append(signal.SIGHUP)
    for number in numbers:
        signal.signal(number, lambda number, frame: asked.append(number))
    leader = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, process_group=0)
    while is_unended_child(leader.pid) and not asked:
        time.sleep(_POLL_SECONDS)
    end_group(leader.pid, float(os.environ.get("STOP_SECONDS", "60")))
    code = leader.wait()
    if asked:
        return 130 if asked[0] == signal.SIGINT else 143
    return code if code >= 0 else 128 - code


def end_group(leader: int, seconds: float) -> None:
    """End every process of a child's group. The child was not reaped: until then its group's number is no other's."""
    if not living_members(leader):
        return
    signal_child(leader, signal.SIGTERM, group=True)
    end = time.monotonic() + seconds
    while time.monotonic() < end and living_members(leader):
        time.sleep(_POLL_SECONDS)
    signal_child(leader, signal.SIGKILL, group=True)


if __name__ == "__main__":
    sys.exit(main())
