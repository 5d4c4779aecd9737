"""A progress line on stderr for work measured in bytes: share done, documents/s, MB/s, time left."""

from __future__ import annotations

import sys
import time

TTY_SECONDS, LOG_SECONDS = 0.2, 5.0  # between lines: a terminal overwrites one line, a log file gets few


class Progress:
    """Use as a context manager. `add` counts up from one process, `update` sets totals that others counted."""

    def __init__(self, name: str, *, total_bytes: int) -> None:
        self.name, self.total_bytes = name, total_bytes
        self.documents = self.text_bytes = self.input_bytes = 0
        self.started = self.shown = time.monotonic()
        self.tty = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._show(end="\n")

    def add(self, documents: int, text_bytes: int, input_bytes: int) -> None:
        self.update(self.documents + documents, self.text_bytes + text_bytes, self.input_bytes + input_bytes)

    def update(self, documents: int, text_bytes: int, input_bytes: int) -> None:
        self.documents, self.text_bytes, self.input_bytes = documents, text_bytes, input_bytes
        if time.monotonic() - self.shown >= (TTY_SECONDS if self.tty else LOG_SECONDS):
            self._show(end="" if self.tty else "\n")

    def _show(self, end: str) -> None:
        self.shown = time.monotonic()
        seconds = max(self.shown - self.started, 1e-9)
        share = min(self.input_bytes / self.total_bytes, 1.0) if self.total_bytes else 1.0
        left = f"{seconds * (1 - share) / share:.0f} s left" if share else "starting"
        line = (
            f"{self.name} {share:4.0%}  {self.documents} documents  {self.documents / seconds:.0f} documents/s  "
            f"{self.text_bytes / seconds / 1e6:.1f} MB/s  {left if share < 1 else f'{seconds:.1f} s'}"
        )
        print(("\r" if self.tty else "") + line, end=end, file=sys.stderr, flush=True)
