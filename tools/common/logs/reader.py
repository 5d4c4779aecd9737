"""Reads the numbers of a training run from a run directory, other programs' logs, tables, or event files."""

from __future__ import annotations

import csv
import lzma
import re
import zlib
from pathlib import Path

from tools.common.console import UsageError
from tools.common.logs.json_logs import read_json
from tools.common.logs.log import Log
from tools.common.logs.log_open import open_text
from tools.common.logs.table_logs import is_header, read_csv, read_folder, read_tensorboard
from tools.common.logs.text_logs import read_text

# a value, or the first line of one; not "[rank0]: ..." and not Python's {'loss': ...}
JSON_START = re.compile(r"\s*(?:\{\s*(?:$|\"|\})|\[\s*(?:$|[\[{\"]))")


def read_logs(path: Path) -> list[Log]:
    """Read the runs in a run directory, log, table or event file: one, except in tables that name several.

    UsageError where there is none, with what was looked for.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such file or run directory")
    try:
        return _read(path)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, csv.Error) as error:  # a packed file that was cut short, too
        raise UsageError(f"{path} cannot be read: {error}") from None


def _read(path: Path) -> list[Log]:
    if path.is_dir():
        return [read_folder(path)]
    if "tfevents" in path.name:
        return [read_tensorboard(path)]
    with open_text(path) as file:
        first = next((line for line in file if line.strip()), "")
    if not first:
        raise UsageError(f"{path} is empty")
    if JSON_START.match(first):
        return [read_json(path)]
    if is_header(first):
        return read_csv(path)
    return [read_text(path)]


def read_log(path: Path) -> Log:
    """Read the run in a file that holds one. Raises UsageError when it holds several."""
    logs = read_logs(path)
    if len(logs) > 1:
        raise UsageError(f"{path} holds {len(logs)} runs ({', '.join(log.name for log in logs[:3])} ...); give a file with one")
    return logs[0]
