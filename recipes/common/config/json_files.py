"""Reads and writes JSON strictly: a file is whole or absent, no key is given twice, and what is wrong is told in one line."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

Kind = TypeVar("Kind", dict, list)
_KINDS = {dict: "an object", list: "a list"}


class JsonError(ValueError):
    """A file that does not hold the JSON that belongs there; the message names the file and says what is wrong."""


def read_json(path: Path, kind: type[Kind] = dict, *, unique: bool = False) -> Kind:
    """Return the content of a JSON file, of the kind at its top. unique: no object may have a key twice.

    Raises JsonError for anything else, and OSError for a file that cannot be read.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JsonError(f"{path}: not UTF-8 at its byte {error.start}, so no JSON") from None
    return parse_json(text, str(path), kind, unique=unique)


def parse_json(text: str | bytes, name: str, kind: type[Kind] = dict, *, unique: bool = False) -> Kind:
    """Return the content of a JSON text, of the kind at its top. Raises JsonError, calling the text `name`."""
    try:
        content = json.loads(text, object_pairs_hook=unique_keys if unique else None)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        empty = " (it is empty)" if not text.strip() else ""
        raise JsonError(f"{name}: no JSON{empty}: {reason}") from None
    if not isinstance(content, kind):
        raise JsonError(f"{name}: holds {type(content).__name__} where {_KINDS[kind]} belongs")
    return content


@contextmanager
def laid_out(name: object) -> Iterator[None]:
    """Raise JsonError, naming the file, where what was read of it is not what belongs there."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
        if isinstance(error, ValueError) and type(error) is not ValueError:  # a message of its own
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise JsonError(f"{name}: not laid out as this version writes it ({what})") from error


def write_json(path: Path, content: Any) -> None:
    """Write `content` so that `path` is the old file or the whole new one at any moment, after a power cut too."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def open_lines(path: Path) -> io.FileIO:
    """Open a file of JSON lines to append to, unbuffered, on a line of its own: a kill may have left half of one."""
    file = path.open("ab+", buffering=0)
    size = file.seek(0, os.SEEK_END)
    if size:
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, as json's object_pairs_hook. Raises ValueError for a key given twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key given twice: {sorted({key for key in keys if keys.count(key) > 1})}")
    return content
