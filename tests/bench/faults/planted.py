"""Plants faults inside a forked rank or supervisor: what happens at its n-th call to the file system is drawn.

Every call of Python's `os` and `io` on a path of the run passes through `Injector.call`, so a process can be killed between any
two of them, and any of them can fail: once, or from then on.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import io
import itertools
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# the calls that are wrapped, by what they do; those of _BY_FILE take a descriptor first
_CALLS = {
    "open": ("open",),
    "list": ("listdir", "scandir"),
    "stat": ("stat", "lstat"),
    "rename": ("rename", "replace"),
    "link": ("link", "symlink"),
    "unlink": ("unlink", "remove", "rmdir"),
    "mkdir": ("mkdir",),
}
_BY_FILE = {
    "fsync": ("fsync", "fdatasync"),
    "write": ("write", "pwrite", "sendfile"),
    "read": ("read", "pread"),
    "stat": ("fstat",),
}
KINDS = ("open", "read", "write", "fsync", "rename", "link", "unlink", "mkdir", "list", "stat")
PLACES = ("checkpoints", "logs", "metrics", "other")
ERRORS = ("EIO", "ENOSPC", "EROFS", "EACCES", "ESTALE", "EMFILE", "EDQUOT")
EXCEPTIONS = {"MemoryError": MemoryError, "ValueError": ValueError, "RuntimeError": RuntimeError}


@dataclass(frozen=True)
class PlantedFault:
    """One thing that happens inside a process of a job, at one of its calls to the file system."""

    process: str  # "rank N", "every rank" or "supervisor"
    what: str  # one of ERRORS or EXCEPTIONS, "kill", "clock", "memory"
    calls: str = "any"  # one of KINDS: which calls count
    place: str = "any"  # one of PLACES: on which files
    at: float = 0.0  # at which of these calls, as a share of those that an undisturbed run makes
    for_good: bool = False  # every later one, too
    every_attempt: bool = False  # else in the first attempt of the supervisor only
    value: float = 0.0  # "clock": seconds that it jumps; "memory": MiB that are left


def place_of(path: str, run_dir: str) -> str | None:
    """Return which part of the run a path belongs to; None outside."""
    if not path.startswith(f"{run_dir}/"):
        return "other" if path == run_dir else None
    first = path[len(run_dir) + 1 :].partition("/")[0]
    return first if first in ("checkpoints", "logs") else "metrics" if first.startswith("metrics") else "other"


class Injector:
    """Counts this process's calls, and lets the planted faults happen."""

    def __init__(self, run_dir: Path, faults: list[tuple[PlantedFault, int]]) -> None:
        """faults: (fault, at which of its calls it happens, from 0)."""
        self.run_dir = str(run_dir)
        self.counts: Counter[tuple[str, str]] = Counter()
        self._real_open = open  # before it is wrapped
        self._planted = [(fault, itertools.count(), nth) for fault, nth in faults]

    def call(self, kind: str, path: str, write: Callable[[], object] = lambda: None) -> None:
        """Count a call; raise or do what is planted on it. write: what a full disk still takes of it."""
        place = place_of(path, self.run_dir)
        if place is None:
            return
        self.counts[kind, place] += 1
        for fault, numbers, nth in self._planted:
            if fault.calls in ("any", kind) and fault.place in ("any", place):
                number = next(numbers)
                if number == nth or (fault.for_good and number > nth):
                    if fault.what in ("ENOSPC", "EDQUOT"):
                        write()
                    self._note(f"{fault.what} at {kind} {path[len(self.run_dir) :]}")
                    happen(fault, path)

    def _note(self, text: str) -> None:
        """Add a line to the trial's record of what happened."""
        with self._real_open(f"{self.run_dir}.happened", "a") as file:
            file.write(text + "\n")


def happen(fault: PlantedFault, path: str) -> None:
    """Do what a fault does, in this process."""
    if fault.what in ERRORS:
        code = getattr(errno, fault.what)
        raise OSError(code, os.strerror(code), path)
    if fault.what in EXCEPTIONS:
        raise EXCEPTIONS[fault.what](f"planted at {path}")
    if fault.what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.what == "clock":
        shift_clock(fault.value)
    if fault.what == "memory":
        limit_memory(int(fault.value) << 20)


def shift_clock(seconds: float) -> None:
    """Let this process's wall clock jump. The files' times stay those of the file system, as on another machine."""
    real = time.time
    time.time = lambda: real() + seconds
    time.time_ns = lambda: int((real() + seconds) * 1e9)

    class Shifted(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return datetime.datetime.fromtimestamp(time.time(), tz)

    for name, module in list(sys.modules.items()):
        if name.startswith(("recipes.common", "tools.")) and getattr(module, "datetime", None) is datetime.datetime:
            module.datetime = Shifted


def limit_memory(left: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + left
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def wrap_calls(injector: Injector) -> None:
    """Let every call of this process pass through the injector."""
    for kind, names in _CALLS.items():
        for name in names:
            setattr(os, name, _wrapped(getattr(os, name), kind, injector))
    for kind, names in _BY_FILE.items():
        for name in names:
            setattr(os, name, _wrapped_by_file(getattr(os, name), kind, injector))
    io.open = _open(io.open, injector)
    import builtins

    builtins.open = io.open


def _wrapped(function: Callable[..., Any], kind: str, injector: Injector) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        # of a rename the new path counts, which is where the directory is written
        path = args[1] if kind in ("rename", "link") and len(args) > 1 else args[0] if args else options.get("path", ".")
        folder = options.get("dir_fd") or options.get("src_dir_fd")
        injector.call(kind, _absolute(path, folder))
        return function(*args, **options)

    call.__name__ = function.__name__
    return call


def _wrapped_by_file(function: Callable[..., Any], kind: str, injector: Injector) -> Callable[..., Any]:
    def call(file: Any, *args: Any) -> Any:
        injector.call(kind, _absolute(file, None))
        return function(file, *args)

    return call


def _absolute(path: Any, folder: int | None) -> str:
    if isinstance(path, int):
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/self/fd/{path}")
        return ""
    text = os.fsdecode(path)
    if folder is not None and not text.startswith("/"):
        with contextlib.suppress(OSError):
            return f"{os.readlink(f'/proc/self/fd/{folder}')}/{text}"
    return text if text.startswith("/") else f"{os.getcwd()}/{text}"


class CountedFile(io.FileIO):
    """A file whose reads and writes are counted, with Python's buffers above it."""

    injector: Injector
    path: str

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.injector.call("write", self.path, lambda: io.FileIO.write(self, view[: len(view) // 2]))
        return super().write(data)

    def readinto(self, buffer: Any) -> int | None:
        self.injector.call("read", self.path)
        return super().readinto(buffer)

    def read(self, size: int = -1) -> bytes | None:
        self.injector.call("read", self.path)
        return super().read(size)

    def readall(self) -> bytes:
        self.injector.call("read", self.path)
        return super().readall()


def _open(real: Callable[..., Any], injector: Injector) -> Callable[..., Any]:
    """Return an `open` whose files of the run read and write through Python, where a call can be counted."""

    def open_file(file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
                  newline: Any = None, closefd: bool = True, opener: Any = None) -> Any:  # fmt: skip
        path = _absolute(file, None)
        if place_of(path, injector.run_dir) is None or "+" in mode:
            return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
        injector.call("open", path)
        raw = CountedFile(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        raw.injector, raw.path = injector, path
        if buffering == 0:
            return raw
        buffered = io.BufferedReader(raw) if mode.startswith("r") else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline, buffering == 1)

    return open_file
