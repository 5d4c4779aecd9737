"""Passes on what the launcher and its ranks print, and goes on when nobody reads it any more.

A launcher, and the ssh or pdsh that bring the ranks' output from other machines, would die at their first line into a pipe
whose reader is gone (`| head`), and take the ranks with them. They write to a pipe that this process reads to its end.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_END_SECONDS = 2.0  # for the last lines, once all who write have been ended


@contextmanager
def relayed() -> Iterator[None]:
    """Put pipes in the place of our stdout and stderr where these are pipes; files and terminals cannot break so, and stay."""
    ends: dict[tuple[int, int], int] = {}  # the pipe behind ours -> the end to write to: one for both keeps the lines in order
    own: dict[int, int] = {}  # descriptor -> what it was
    threads = []
    for number in (1, 2):
        if not _is_pipe(number):
            continue
        of = os.fstat(number)
        own[number] = os.dup(number)
        if (of.st_dev, of.st_ino) not in ends:
            read, write = os.pipe()
            ends[of.st_dev, of.st_ino] = write
            threads.append(threading.Thread(target=_pass_on, args=(read, own[number]), name="relay", daemon=True))
            threads[-1].start()
        os.dup2(ends[of.st_dev, of.st_ino], number)
    for end in ends.values():
        os.close(end)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        for number, before in own.items():
            os.dup2(before, number)
        for thread in threads:
            thread.join(_END_SECONDS)


def _is_pipe(number: int) -> bool:
    try:
        mode = os.fstat(number).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _pass_on(read: int, number: int) -> None:
    """Copy until all who write have closed their end; where the reader is gone, read on."""
    with contextlib.suppress(OSError):
        while data := os.read(read, 1 << 16):
            with contextlib.suppress(OSError):
                while data:
                    data = data[os.write(number, data) :]
    os.close(read)
