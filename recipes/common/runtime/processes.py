"""Signals a process that is known by more than its number, which the kernel may have given to another. Standard library only."""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class KnownProcess:
    """A process by its pidfd or, where the kernel gives none, by its number and its start; with neither, one that is gone."""

    pid: int
    fd: int | None
    start: str | None  # in the kernel's ticks

    def send(self, number: int) -> bool:
        """Send a signal; return whether the process is there and was not replaced by another of its number."""
        try:
            if self.fd is not None:
                signal.pidfd_send_signal(self.fd, number)
                return True
            if self.start is None or self.start != start_of(self.pid):
                return False
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)


def open_process(pid: int) -> KnownProcess | None:
    """Return the process that has this number now; None if there is none, or neither a pidfd nor /proc to know it by."""
    try:
        return KnownProcess(pid, os.pidfd_open(pid), None)
    except ProcessLookupError:
        return None
    except (OSError, AttributeError):  # an old kernel, a sandbox that forbids it, not Linux
        start = start_of(pid)
        return None if start is None else KnownProcess(pid, None, start)


def start_of(pid: int) -> str | None:
    """Return when a process started, in the kernel's ticks since its boot."""
    stat = _stat(pid)
    return stat[19] if stat else None


def is_in_use(pid: int) -> bool | None:
    """Return whether a process, or one that ended and was not reaped, has this number; None where that cannot be told."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return None
    return True


def living_members(group: int) -> list[int]:
    """Return the processes of a group that have not ended."""
    found = [(pid, _stat(pid)) for pid in _numbers()]
    return [pid for pid, stat in found if stat and int(stat[2]) == group and stat[0] not in "ZX"]


def _numbers() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()] if os.path.isdir("/proc") else []


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def is_unended_child(pid: int) -> bool:
    """Return whether a child runs, without reaping it: until then its number, as that of its group and session, is no other's."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def signal_child(pid: int, number: int, *, group: bool = False) -> None:
    """Signal a child, or the process group that it leads. Only before it was reaped: until then the number is no other's."""
    with contextlib.suppress(ProcessLookupError):
        (os.killpg if group else os.kill)(pid, number)


def kill_session(leader: int) -> None:
    """End every process of the session of a child that was not reaped yet, whoever adopted them."""
    for pid in _numbers():
        if (process := open_process(pid)) is None:
            continue
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == leader:  # asked after it was opened: a number's next owner is not what we signal
                process.send(signal.SIGKILL)
        process.close()
