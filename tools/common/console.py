"""What tools do on the console: exit codes, one message for the user's mistakes, a progress bar on stderr, tables."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

from recipes.common.checkpoint.files import CheckpointError
from recipes.common.config.json_files import JsonError
from recipes.common.recipe import RecipeError
from recipes.common.run_dir.lease import LeaseHeldError, LeaseLostError

GOOD, FAILED, MISTAKE = 0, 1, 2
SHOW_AFTER_SECONDS = 2.0  # a progress bar for work that takes longer
# what a terminal obeys, or what turns the text around it: escape sequences, C1 controls, marks of writing direction
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
LINE_SECONDS = 0.2, 5.0  # between refreshes: on a terminal, in a log file


_CURES = {  # of errors that the machine reports and the user can cure
    (errno.EACCES, errno.EPERM): "give this user the right to it, or name another place",
    (errno.EROFS,): "its file system is mounted read-only; name another place",
    (errno.ENOSPC, errno.EDQUOT): "free some space there, or name another place",
    (errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP): "correct the path",
    (errno.ENOTDIR, errno.EISDIR, errno.EEXIST): "a file is where a folder is needed, or a folder where a file is; name another",
    (errno.EMFILE, errno.ENFILE): "too many files are open; raise the limit (`ulimit -n`)",
}


class UsageError(ValueError):
    """The user's mistake in a command or in the folders it names; the message says how to fix it."""


class CheckError(RuntimeError):
    """A check that failed; the message says what was found where."""


@contextmanager
def as_usage_error(*kinds: type[Exception]) -> Iterator[None]:
    """Raise UsageError, with the same message, for an error that a library raises for the user's mistake."""
    try:
        yield
    except kinds as error:
        raise UsageError(machine_words(error) or str(error)) from error


class ToolOutput:
    """A text stream whose reader may go (`... | head` has seen enough): then what is written is dropped, and the work goes on."""

    def __init__(self, stream: TextIO, shown: Callable[[str], str] = str) -> None:
        """shown: the text as it is to be written."""
        self._stream, self._shown = stream, shown

    def write(self, text: str) -> int:
        try:
            self._stream.write(self._shown(text))
        except BrokenPipeError:
            _leave(self._stream)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            _leave(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def exit_code(work: Callable[[], int]) -> int:
    """Run `work` and return its exit code: 2 for the user's mistake, 1 for a failed check; a message replaces the traceback.

    Whatever `work` prints on stdout is printed as `printable` shows it; stderr has a bar that moves.
    """
    with contextlib.ExitStack() as printing:
        if sys.stdout is not None:
            printing.enter_context(contextlib.redirect_stdout(ToolOutput(sys.stdout, printable)))
        if sys.stderr is not None:
            printing.enter_context(contextlib.redirect_stderr(ToolOutput(sys.stderr)))
        return _code_of(work)


def _code_of(work: Callable[[], int]) -> int:
    try:
        code = work()
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a full disk can still be told
        return code
    except (UsageError, RecipeError, JsonError, LeaseHeldError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return MISTAKE
    except (CheckError, CheckpointError, LeaseLostError) as error:
        print(f"failed: {printable(str(error))}", file=sys.stderr)
        return FAILED
    except OSError as error:
        text = machine_words(error)
        if text is None:
            raise
        with contextlib.suppress(OSError):
            print(f"error: {printable(text)}", file=sys.stderr)
        if error.filename is None and sys.stdout is not None:
            _leave(sys.stdout)
        return MISTAKE


def machine_words(error: Exception) -> str | None:
    """Return an error that the machine reported and the user can cure in words, with the cure; None for any other."""
    cure = next((cure for numbers, cure in _CURES.items() if isinstance(error, OSError) and error.errno in numbers), None)
    if cure is None:
        return None
    where = " and ".join(str(name) for name in (error.filename, error.filename2) if name is not None) or "what is written"
    return f"{where}: {error.strerror}; {cure}"


def _leave(stream: TextIO | ToolOutput) -> None:
    """Send what a stream still holds, and what follows, to nothing: written later, it would fail again."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a test's stdout is no file
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)


def printable(text: str) -> str:
    """Return a text from a file as a terminal may get it: control characters are shown as escapes; newlines and tabs stay."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def tell_notes(notes: Iterable[str]) -> None:
    """Print what a user should know besides the result, on stderr, a line each and each once."""
    for note in dict.fromkeys(notes):
        print(printable(f"note: {note}"), file=sys.stderr)


def progress_bar(name: str, total: int, unit: str = "B") -> tqdm:
    """Show what is done of `total`, on stderr, once the work takes longer than two seconds. Close it, or use it in a `with`."""
    line_seconds = LINE_SECONDS[not sys.stderr.isatty()]
    return tqdm(
        desc=name,
        total=total,
        unit=unit,
        unit_scale=unit == "B",
        delay=SHOW_AFTER_SECONDS,
        mininterval=line_seconds,
        file=sys.stderr,
        leave=False,
        dynamic_ncols=True,
    )


def quiet_transformers() -> None:
    """Silence transformers' own warnings and progress bars."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def table(rows: list[list[object]], header: list[str]) -> str:
    """Format columns under a header, numbers aligned right."""
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
