"""Connects a rank to its launcher and its supervisor, so that no rank outlives its job.

- If its launcher dies, by whatever signal, the kernel kills the rank (PR_SET_PDEATHSIG).
- If its supervisor (tools/supervise, named by TRIFOLD_SUPERVISOR) dies or cannot be reached, rank_guard.py kills it.
- SIGUSR2 prints the stack of every thread, also of a rank that waits inside a collective.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import subprocess
import sys
from pathlib import Path

from recipes.common.runtime.authenticated_link import SECRET, SECRET_FILE

SUPERVISOR = "TRIFOLD_SUPERVISOR"  # HOST:PORT; the secret comes by authenticated_link.SECRET or SECRET_FILE
# the trainer's function in which a rank waits for all others: where a GPU computes, no frame of torch.distributed shows that
WAITING_FUNCTION = "_sum_over_ranks"
# and where messages are waited for inside torch's own threads: (file, function)
WAITING_FRAMES = (
    ("stage_messages.py", "wait_for"), ("stage_messages.py", "finish"), ("router_losses.py", "total"),
    ("collectives.py", "result"),
)  # fmt: skip
_PR_SET_PDEATHSIG = 1


class SupervisorLink:
    """A rank's connection to the supervisor, kept for its whole life. `report_exit` sends the exit word and a detail.

    Words: "finished", "stopped", "user_error", "disk_error", "training_error", "unsaved", "failed", "peer_lost". A killed one
    sends none.
    """

    def __init__(self, rank: int) -> None:
        self._report: int | None = None  # a pipe to the guard
        if "LOCAL_RANK" in os.environ and sys.platform == "linux":  # a launcher's child; a shell's child outlives its shell
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        address = os.environ.get(SUPERVISOR)
        if address is None:
            faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)  # stderr itself, not what Python has put in its place
            return
        stacks, self._stacks = os.pipe()
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        report, self._report = os.pipe()
        guard = Path(__file__).with_name("rank_guard.py")
        command = [sys.executable, "-I", "-S", str(guard), address, str(rank), str(os.getpid()), str(stacks)]
        self._guard = subprocess.Popen(command, stdin=report, stdout=subprocess.DEVNULL, pass_fds=[stacks])
        for name in (SECRET, SECRET_FILE):  # its guard has them now: programs that the rank starts get none
            os.environ.pop(name, None)
        os.close(report)
        os.close(stacks)

    def report_exit(self, word: str, detail: str = "") -> None:
        if self._report is not None:
            with contextlib.suppress(OSError):
                os.write(self._report, f"{word}\n{detail[:2000]}\n".encode())
