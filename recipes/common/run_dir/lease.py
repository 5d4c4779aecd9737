"""Holds a folder for one process at a time, on any file system that several hosts share: a lease, renewed while it is held.

    lease/job.000003.json    {"what", "host", "boot", "pids", "pid", "started", "token", "beats", "released"}

The file of the highest number is the lease. To take it over, a process creates the next number, which only one can. A holder on
this machine is dead when it has no process of that number and start time; one elsewhere, when it has not renewed `beats` for
DEAD_SECONDS as measured here: no two clocks are compared. A holder that only seemed dead finds the higher number, and stops.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from recipes.common.runtime.processes import is_in_use

RENEW_SECONDS = 2.0
DEAD_SECONDS = 30.0  # without a renewal, of a holder on another machine
_POLL_SECONDS = 0.2
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
FOLDER = "lease"  # of a run directory
_BYTES = 1024  # one write inside one page: a reader sees the old line or the new one


class LeaseHeldError(RuntimeError):
    """A living process holds the folder; the message names it."""


class LeaseLostError(RuntimeError):
    """Another process has taken the folder over, since this one seemed dead; the message names it."""


@dataclass(frozen=True)
class Holder:
    """The content of a lease: who holds it."""

    what: str  # "a run", for people
    host: str
    boot: str  # of that host, one number a boot
    pids: str  # its namespace of process numbers: pods on one host have their own
    pid: int
    started: str  # when that process began, in the kernel's count since the boot
    token: str  # unique to this holder; begins with the lease's number
    beats: int = 0
    released: bool = False

    def __str__(self) -> str:
        return f"{self.what} (process {self.pid} on {self.host})"


class Lease:
    """A lease that this process holds. A thread renews it until `release`."""

    def __init__(self, of: Path, folder: Path, name: str, number: int, file: int, holder: Holder) -> None:
        self.token, self._of = holder.token, of
        self._folder, self._name, self._path = folder, name, _path(folder, name, number)
        self._file, self._holder = file, holder
        self._stop, self._looking = threading.Event(), threading.Lock()
        self._lost: str | None = None
        self._renewer = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._renewer.start()

    def check(self) -> None:
        """Raise LeaseLostError where the thread has seen a later holder. Costs nothing."""
        if self._lost is not None:
            raise LeaseLostError(self._lost)

    def confirm(self) -> None:
        """Raise LeaseLostError where there is a later holder now."""
        self._look()
        probe = self._folder / f".{self._name}.{secrets.token_hex(4)}.probe"
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY))  # NFS lists a folder anew after one's own change to it
        probe.unlink()
        self._look()
        self.check()

    def release(self, *, keep: bool = True) -> None:
        """Give the lease back. keep: leave its file, so that the numbers go on; else remove it."""
        self._stop.set()
        self._renewer.join()
        with contextlib.suppress(OSError):
            self._look()
            if self._lost is None and keep:
                self._write(released=True)
            elif self._lost is None:
                self._path.unlink()
        with contextlib.suppress(OSError):
            os.close(self._file)

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_SECONDS):
            with contextlib.suppress(Exception):  # a full disk, say: it must not end the run, nor this thread
                self._write()
            with contextlib.suppress(Exception):
                self._look()

    def _write(self, *, released: bool = False) -> None:
        self._holder = replace(self._holder, beats=self._holder.beats + 1, released=released)
        os.pwrite(self._file, _encode(self._holder), 0)

    def _look(self) -> None:
        """See whether another process holds the folder, by a higher number, or by this one after somebody deleted the file."""
        with self._looking:
            if not self._path.exists():
                self._folder.mkdir(parents=True, exist_ok=True)
                file = _create(self._path, self._holder)
                if file is not None:
                    os.close(self._file)
                    self._file = file
            other = _read(_path(self._folder, self._name, _numbers(self._folder, self._name)[-1]))
            if other is not None and other.token != self.token:
                self._lost = f"{self._of} was taken over by {other}, as this process had not renewed its lease"


@contextlib.contextmanager
def hold_run(out_dir: Path, report: Callable[[str], None]) -> Iterator[Lease]:
    """Hold a run directory, on rank 0, for whom all others wait. Where another job holds it, end the process with exit code 2.

    report: told the exit word (SupervisorLink.report_exit).
    """
    try:
        lease = take_lease(out_dir, out_dir / FOLDER, "job", "a run")
    except LeaseHeldError as error:
        print(f"error: --out-dir: {error}", file=sys.stderr)
        report("user_error")
        sys.exit(2)
    try:
        yield lease
    finally:
        lease.release()


@contextlib.contextmanager
def held(of: Path, folder: Path, name: str, what: str) -> Iterator[Lease]:
    """Hold `of` while a tool works in it, and leave no trace. Raises LeaseHeldError."""
    made = [path for path in (folder, of) if not path.exists()]
    lease = take_lease(of, folder, name, what)
    try:
        yield lease
    finally:
        lease.release(keep=False)
        for path in made:
            with contextlib.suppress(OSError):  # it holds something
                path.rmdir()


def take_lease(of: Path, folder: Path, name: str, what: str) -> Lease:
    """Take the lease `name` in `folder`, after waiting until a holder that may be dead has shown which. Raises LeaseHeldError.

    of, what: what is held, and who holds it, for people.
    """
    boot, pids = _machine()
    own = Holder(what, socket.gethostname(), boot, pids, os.getpid(), _started(os.getpid()) or "", "")
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        before = _numbers(folder, name)
        if before:
            _wait_until_dead(_path(folder, name, before[-1]), of)
        number = before[-1] + 1 if before else 1
        holder = replace(own, token=f"{number}-{secrets.token_hex(6)}")
        file = _create(_path(folder, name, number), holder)
        if file is None:  # another process was faster
            continue
        lease = Lease(of, folder, name, number, file, holder)
        try:
            for other in _numbers(folder, name):
                if other != number and other not in before[-1:]:  # where files were removed in between, numbers began anew
                    _wait_until_dead(_path(folder, name, other), of)
        except LeaseHeldError:
            lease.release(keep=False)
            raise
        if _numbers(folder, name)[-1] != number:  # a later one came and went
            lease.release(keep=False)
            continue
        for other in _numbers(folder, name):
            if other < number:
                with contextlib.suppress(OSError):  # it says nothing any more
                    _path(folder, name, other).unlink()
        return lease


def _create(path: Path, holder: Holder) -> int | None:
    """Create a lease file with its content, as the only one to do so, and return it open. None where it exists."""
    whole = path.with_name(f".{path.name}.{holder.token}")
    file = os.open(whole, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
    try:
        os.write(file, _encode(holder))
        os.fsync(file)
        os.link(whole, path)
    except FileExistsError:
        if os.fstat(file).st_nlink == 2:  # NFS asked twice, and answered for the first time
            return file
        os.close(file)
        return None
    except OSError as error:
        os.close(file)
        if error.errno not in _NO_LINKS:
            raise
        return _create_without_links(path, holder)
    finally:
        with contextlib.suppress(OSError):
            whole.unlink()
    return file


def _create_without_links(path: Path, holder: Holder) -> int | None:
    """Do the same where the file system has no hard links: a reader may see the file before its content."""
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
    except FileExistsError:
        return None
    os.write(file, _encode(holder))
    os.fsync(file)
    return file


def _wait_until_dead(path: Path, of: Path) -> None:
    """Return once the holder has released its lease or is dead. Raises LeaseHeldError once it is known to live."""
    began, first, told = time.monotonic(), None, False
    while path.exists():
        holder = _read(path)
        if holder is not None:
            first = first or holder
            here = (holder.boot, holder.pids) == _machine() and holder.boot != ""
            alive = _lives(holder.pid, holder.started) if here else None
            if holder.released or alive is False:
                return
            waited = time.monotonic() - began > DEAD_SECONDS
            if holder.beats != first.beats or (waited and alive):
                raise LeaseHeldError(f"{of} is in use by {holder}; wait until it has ended, or give another folder")
        if time.monotonic() - began > DEAD_SECONDS:
            return
        if not told and time.monotonic() - began > 2 * RENEW_SECONDS:
            told = True
            print(f"waiting for up to {DEAD_SECONDS:.0f} s to see whether {holder or path} is alive", file=sys.stderr, flush=True)
        time.sleep(_POLL_SECONDS)


def _machine() -> tuple[str, str]:
    """Return (this boot of this machine, the namespace of its process numbers); empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return "", ""


def _lives(pid: int, started: str) -> bool | None:
    """Whether the process that began then still runs on this machine; None where another user's processes are hidden."""
    now = _started(pid)
    if now is not None:
        return now == started
    # a number in use without a start to see: dead, its parent has not asked for its exit code
    return None if is_in_use(pid) is None else False


def _started(pid: int) -> str | None:
    """Return when a process began, in the kernel's ticks since the boot; None where there is none to see, or a dead one."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else fields[18]


def _path(folder: Path, name: str, number: int) -> Path:
    return folder / f"{name}.{number:06d}.json"


def _numbers(folder: Path, name: str) -> list[int]:
    """Return the numbers of the lease's files, in order."""
    form = re.compile(re.escape(name) + r"\.(\d{6,})\.json")
    return sorted(int(found[1]) for found in map(form.fullmatch, os.listdir(folder)) if found)


def _encode(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode().ljust(_BYTES - 1) + b"\n"


def _read(path: Path) -> Holder | None:
    """Return who holds a lease; None where its file is gone, or is not whole yet."""
    try:
        return Holder(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
