"""Counts the signals that ask the supervisor to end its job."""

from __future__ import annotations

import signal
from dataclasses import dataclass


@dataclass
class StopRequests:
    """How often this process was asked to end, and by which signal first."""

    times: int = 0
    first_signal: str = ""

    def listen(self) -> None:
        """Count the signals that ask to end, but for those that are ignored: nohup has SIGHUP ignored."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.add)

    def count(self) -> int:
        return self.times

    def add(self, number: int, frame: object) -> None:
        self.times += 1
        self.first_signal = self.first_signal or signal.Signals(number).name
