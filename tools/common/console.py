"""What every tool does on the console: exit codes, one message for the user's mistakes, a progress bar on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

GOOD, FAILED, MISTAKE = 0, 1, 2
SHOW_AFTER_SECONDS = 2.0  # a progress bar for work that takes longer
LINE_SECONDS = 0.2, 5.0  # between refreshes: on a terminal, in a log file


class UsageError(ValueError):
    """The user's mistake in a command or the folders it names; the message names the cure."""


class CheckError(RuntimeError):
    """What the tool checks is not so; the message says what was found where."""


def exit_code(work: Callable[[], int], *failures: type[Exception]) -> int:
    """Run `work`. UsageError becomes 2, CheckError and `failures` become 1, each with its message and no traceback."""
    try:
        return work()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except (CheckError, *failures) as error:
        print(f"failed: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # `... | head` has seen enough
        sys.stderr.close()
        return GOOD


def progress_bar(name: str, total_bytes: int) -> tqdm:
    """Bytes done, on stderr, once the work takes longer than two seconds. Close it, or use it in a `with`."""
    line_seconds = LINE_SECONDS[not sys.stderr.isatty()]
    return tqdm(
        desc=name,
        total=total_bytes,
        unit="B",
        unit_scale=True,
        delay=SHOW_AFTER_SECONDS,
        mininterval=line_seconds,
        file=sys.stderr,
        leave=False,
        dynamic_ncols=True,
    )


def quiet_transformers() -> None:
    """No warnings and no bars of its own: what matters is in the tool's output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def table(rows: list[list[object]], header: list[str]) -> str:
    """Columns under a header; numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in [header, *cells]) for column in range(len(header))]
    right = [bool(rows) and all(isinstance(row[column], int | float) for row in rows) for column in range(len(header))]

    def line(row: list[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), *(line(row) for row in cells)])


def human_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


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
