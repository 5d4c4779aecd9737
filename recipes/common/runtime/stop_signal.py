"""Stops a run on request: SIGTERM and SIGUSR1 (Slurm's warning before the time limit) save a checkpoint and end it cleanly."""

from __future__ import annotations

import os
import signal
import socket
import threading

GRACE_SECONDS = 20.0  # a rank that reaches no step boundary in this time is stuck in a collective whose peer is gone


class StopRequest:
    """Knows whether this process was asked to stop. The ranks agree through the step's votes, so that all save the same step.

    A Python signal handler does not run while the main thread waits inside a collective, so a thread listens too: it ends the
    process when no step boundary is reached in `GRACE_SECONDS`.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._boundary = threading.Event()
        self._ending = False
        if threading.current_thread() is not threading.main_thread():
            return  # Python handles signals in the main thread only
        listen, wake = socket.socketpair()
        wake.setblocking(False)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        self._sockets = (listen, wake)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)
        threading.Thread(target=self._listen, args=(listen,), name="signal listener", daemon=True).start()

    def requested(self) -> bool:
        """Return whether to stop. Call it at every step boundary."""
        self._boundary.set()
        return self.name is not None

    def end(self) -> None:
        """Call after the last step: what follows, the last save, has no step boundaries and may take longer."""
        self._ending = True
        self._boundary.set()

    def _note(self, number: int, frame: object) -> None:
        self.name = signal.Signals(number).name

    def _listen(self, listen: socket.socket) -> None:
        while number := listen.recv(1):
            if number[0] not in (signal.SIGTERM, signal.SIGUSR1):
                continue
            self._boundary.clear()
            if not self._boundary.wait(GRACE_SECONDS) and not self._ending:
                os._exit(128 + number[0])
