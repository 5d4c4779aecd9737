"""Ends a rank: when one fails, its traceback is the last thing on the screen.

The others fail too, an instant later, with a broken connection: that is noise. Each rank writes its traceback to `logs/`; one
that finds an earlier failure of this start there prints a single line instead of its own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from recipes.common.runtime.supervisor_link import WAITING_FRAMES

_SETTLE_SECONDS = 1.0  # the first failure's file may be a moment late on a shared file system

FAILED, MISTAKE, NUMBERS, UNSAVED = 1, 2, 3, 4  # exit codes
_CURES = {
    errno.EACCES: "give this user the right to it",
    errno.EPERM: "give this user the right to it",
    errno.EROFS: "its file system is mounted read-only; choose another folder",
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there",
}


class TrainingError(RuntimeError):
    """Continuing is useless; the message says which numbers show it, and from where to resume."""


class UnsavedError(RuntimeError):
    """The run is over and its last state is not on disk; the message says why, and what is there."""


@contextmanager
def guard_rank(out_dir: Path, rank: int, report: Callable[[str, str], None] = lambda word, detail: None) -> Iterator[None]:
    """End the process on any exception: exit code 1 (3: a TrainingError), its traceback in out_dir/logs/rank_N.traceback.

    An UnsavedError has exit code 4 and no traceback: it is the disk's, and the same on every rank.

    report: called with the exit word and the error in a line (SupervisorLink.report_exit). The process ends at once: an orderly
    exit would wait for peers that are gone.
    """
    logs = out_dir / "logs"
    before = _tracebacks(logs)
    mine = logs / f"rank_{rank}.traceback"
    with contextlib.suppress(OSError):  # a folder that is read-only now is the save's to report
        mine.unlink(missing_ok=True)
    try:
        yield
    except KeyboardInterrupt:
        os._exit(130)
    except SystemExit:
        raise
    except UnsavedError as error:
        if rank == 0:
            _print(f"error: {error}")
        report("unsaved", str(error))
        os._exit(UNSAVED)
    except BaseException as error:
        text = traceback.format_exc()
        lost_a_peer = _is_lost_peer(error)
        if lost_a_peer:
            time.sleep(_SETTLE_SECONDS)
        first = _earlier_failure(logs, mine, before) if lost_a_peer else None
        if first is None:
            with contextlib.suppress(OSError):  # a full disk
                logs.mkdir(parents=True, exist_ok=True)
                mine.write_text(text)
            _print(f"\nrank {rank} failed; its traceback:\n{text}")
        else:
            _print(f"rank {rank} stopped: {first.stem} failed first")
        numbers = isinstance(error, TrainingError)
        word = "training_error" if numbers else "peer_lost" if lost_a_peer else "failed"
        report(word, f"{type(error).__name__}: {error}")
        os._exit(NUMBERS if numbers else FAILED)


@contextmanager
def refusals(rank: int, report: Callable[[str], None], *kinds: type[Exception]) -> Iterator[None]:
    """End the process with code 2 and one line, for what only a start finds and the user can cure.

    kinds: errors that every rank finds alike; rank 0 prints them. A file that cannot be read or written may be one rank's own.
    """
    try:
        yield
    except (OSError, *kinds) as error:
        text = str(error)
        if isinstance(error, OSError):
            if error.errno not in _CURES or error.filename is None:
                raise
            text = f"{error.filename}: {error.strerror}; {_CURES[error.errno]}, and start again"
        if rank == 0 or isinstance(error, OSError):
            print(f"error: {text}", file=sys.stderr, flush=True)
        report("disk_error" if isinstance(error, OSError) else "user_error")
        os._exit(MISTAKE)


def end_rank(report: Callable[[], None] = lambda: None) -> NoReturn:
    """End a finished rank with code 0 once all have finished, without cleaning up. report: called just before.

    An orderly exit runs the destructors of torch's communication threads; now and then one aborts, and a finished run would
    end with an error.
    """
    import torch.distributed as dist

    dist.barrier()
    report()
    _print("")
    os._exit(0)


def _print(text: str) -> None:
    """Print on stderr, where there is one: a terminal or a pipe that was closed must not change how a rank ends."""
    for stream, words in ((sys.stdout, ""), (sys.stderr, text + "\n" if text else "")):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.write(words)
            stream.flush()


def _is_lost_peer(error: BaseException) -> bool:
    """Return whether torch.distributed lost a peer: a plain RuntimeError raised in its backend (gloo) or a DistError (NCCL)."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    waited = (Path(frames[-1].filename).name, frames[-1].name) in WAITING_FRAMES
    return waited or any(Path(f.filename).parts[-2:-1] == ("distributed",) for f in frames)


def _earlier_failure(logs: Path, mine: Path, before: Mapping[Path, tuple[int, int]]) -> Path | None:
    """Return the first traceback of this start: one that is not as it was `before`. Hosts' clocks would not tell."""
    new = {path: mark for path, mark in _tracebacks(logs).items() if path != mine and before.get(path) != mark}
    return min(new, key=lambda path: new[path], default=None)


def _tracebacks(logs: Path) -> dict[Path, tuple[int, int]]:
    """Return when each rank's traceback was written, by the file system's own clock, and how long it is."""
    marks = {}
    for path in logs.glob("rank_*.traceback"):
        with contextlib.suppress(OSError):  # removed by a rank that starts
            state = path.stat()
            marks[path] = state.st_mtime_ns, state.st_size
    return marks
