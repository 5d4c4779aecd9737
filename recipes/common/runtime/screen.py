"""Keeps a run apart from its screen: with stdout or stderr closed, their reader gone, or their disk full, training goes on."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import Any, TextIO

_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENOTCONN, errno.ECONNRESET, errno.ESHUTDOWN)  # for good


class Screen:
    """A text stream whose write and flush never raise. What cannot be shown is lost; all else is the stream's own."""

    def __init__(self, stream: TextIO, number: int) -> None:
        """number: of the file descriptor under it, which is pointed at nothing once its reader is gone."""
        self._stream, self._number = stream, number

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except (OSError, ValueError) as error:
            self._lose(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return self._stream.isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lose(self, error: OSError | ValueError) -> None:
        if isinstance(error, OSError) and error.errno in _GONE:
            _to_nothing(self._number)  # also what C++ and child processes write


def keep_screen() -> None:
    """Make this process's stdout and stderr such that nothing written there can fail. Call it before anything else.

    A descriptor that is closed is opened on nothing: the next file of the run would get its number, and what is printed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            _to_nothing(number)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            stream = os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
        if not isinstance(stream, Screen):
            setattr(sys, name, Screen(stream, number))


def _to_nothing(number: int) -> None:
    with contextlib.suppress(OSError):
        nothing = os.open(os.devnull, os.O_RDWR)
        if nothing != number:
            os.dup2(nothing, number)
            os.close(nothing)
