"""What ties a rank to those who started it, so that no rank outlives its job.

- Its launcher dies, by whatever signal: the kernel ends the rank (PR_SET_PDEATHSIG).
- Its supervisor (tools/supervise, named by TRIFOLD_SUPERVISOR) dies, or is out of reach: rank_guard.py ends it.
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

SUPERVISOR = "TRIFOLD_SUPERVISOR"  # HOST:PORT:TOKEN
# the trainer's function in which a rank waits for all others: where a GPU computes, no frame of torch.distributed shows that
WAITING_FUNCTION = "_sum_over_ranks"
_PR_SET_PDEATHSIG = 1


class SupervisorLink:
    """Held by a rank for its whole life. `say` leaves the last words by which the supervisor tells ends apart.

    Words: "finished", "left", "user_error", "training_error", "failed", "peer_lost"; without any, the rank was killed.
    """

    def __init__(self, rank: int) -> None:
        self._words: int | None = None
        if "LOCAL_RANK" in os.environ and sys.platform == "linux":  # a launcher's child; a shell's child outlives its shell
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        address = os.environ.get(SUPERVISOR)
        if address is None:
            faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)  # stderr itself, whatever stands for it
            return
        stacks, self._stacks = os.pipe()
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        words, self._words = os.pipe()
        guard = Path(__file__).with_name("rank_guard.py")
        command = [sys.executable, "-I", "-S", str(guard), address, str(rank), str(os.getpid()), str(stacks)]
        self._guard = subprocess.Popen(command, stdin=words, stdout=subprocess.DEVNULL, pass_fds=[stacks])
        os.close(words)
        os.close(stacks)

    def report_exit(self, word: str, detail: str = "") -> None:
        if self._words is not None:
            with contextlib.suppress(OSError):
                os.write(self._words, f"{word}\n{detail[:2000]}\n".encode())
