"""The inputs of tools.prepare_data: files, what is in them, and how they are cut into pieces of work.

A piece of work (`Unit`) is a list of ranges of files and depends on the inputs alone, never on the number of processes,
so the same inputs give the same shards anywhere. Documents come out one at a time, with file and offset.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

SKIPPED_FOLDERS = ("site-packages", "dist-packages", "__pycache__")  # never read inside an input folder, nor hidden ones
MIN_UNIT_BYTES = 1 << 20
MAX_UNIT_BYTES = 256 << 20
UNITS = 64  # aimed at between those two


@dataclass(frozen=True, kw_only=True)
class InputFile:
    path: str
    source: int  # number of the INPUT argument it came from
    kind: str  # "text" or "jsonl"
    bytes: int
    changed_ns: int  # modification time, to notice that an input changed


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Part of one file: bytes [start, stop) of a .jsonl, the whole of any other."""

    file: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Document:
    text: str | None  # None: it cannot be read, for the reason in `problem`
    offset: int  # bytes from the start of the (uncompressed) file; its line in a compressed .jsonl
    problem: str = ""
    bytes: int = 0  # of input it took; 0 in a compressed file


class InputError(ValueError):
    """The user's mistake in an input."""


def kind_of(path: Path, as_text: bool) -> str | None:
    """How a file is read, by its name; None for a file we do not know."""
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".jsonl", ".ndjson")):
        return "jsonl"
    if as_text or name.endswith((".txt", ".text", ".md")):
        return "text"
    return None


def list_files(inputs: list[str], suffixes: list[str], excluded: list[str]) -> list[InputFile]:
    """Every file to read, in a fixed order. Raises InputError naming each input that is missing, unknown or empty."""
    found: list[InputFile] = []
    problems = []
    for source, name in enumerate(inputs):
        root = Path(name)
        if not root.exists():
            problems.append(f"{name}: no such file or folder")
            continue
        before = len(found)
        for path in _walk(root, set(excluded) | set(SKIPPED_FOLDERS)):
            if root.is_dir() and suffixes and not path.name.endswith(tuple(suffixes)):
                continue
            kind = kind_of(path, as_text=bool(suffixes) or not root.is_dir())
            if kind is None:
                continue
            state = path.stat()
            found.append(
                InputFile(path=str(path), source=source, kind=kind, bytes=state.st_size, changed_ns=state.st_mtime_ns)
            )
        if len(found) == before:
            wanted = " ".join(suffixes) if suffixes else ".txt .text .md .jsonl .ndjson (and .gz)"
            problems.append(f"{name}: no file with {wanted} in it; choose with --suffix")
    if problems:
        raise InputError("; ".join(problems))
    return found


def _walk(root: Path, excluded: set[str]) -> Iterator[Path]:
    if not root.is_dir():
        yield root
        return
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in excluded and not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path


def plan_units(files: list[InputFile]) -> list[list[Piece]]:
    """Cut the files into pieces of work of about equal size, each a list of pieces in order."""
    total = sum(file.bytes for file in files)
    unit_bytes = min(max(total // UNITS, MIN_UNIT_BYTES), MAX_UNIT_BYTES)
    units: list[list[Piece]] = []
    filled = unit_bytes
    for number, file in enumerate(files):
        start = 0
        while start < file.bytes or start == 0:
            if filled >= unit_bytes:
                units.append([])
                filled = 0
            splittable = file.kind == "jsonl" and not file.path.endswith(".gz")
            stop = min(start + unit_bytes - filled, file.bytes) if splittable else file.bytes
            units[-1].append(Piece(file=number, start=start, stop=stop))
            filled += max(stop - start, 1)
            start = max(stop, 1)
    return units


def read_piece(file: InputFile, piece: Piece, text_key: str) -> Iterator[Document]:
    """The documents of one piece, in order."""
    with open_bytes(file.path) as stream:
        if file.kind == "text":
            yield _decoded(stream.read(), 0)
        else:
            yield from _json_lines(stream, piece, text_key, compressed=file.path.endswith(".gz"))


def open_bytes(path: str) -> BinaryIO:
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")


def _decoded(raw: bytes, offset: int) -> Document:
    try:
        return Document(text=raw.decode("utf-8"), offset=offset, bytes=len(raw))
    except UnicodeDecodeError as error:
        return Document(text=None, offset=offset, problem=f"not UTF-8 at byte {offset + error.start}")


def _json_lines(stream: BinaryIO, piece: Piece, text_key: str, compressed: bool) -> Iterator[Document]:
    """The lines that begin inside the piece. Blank lines are no documents."""
    at = 0
    if piece.start:
        stream.seek(piece.start - 1)
        at = piece.start - 1 + len(stream.readline())
    for number, line in enumerate(stream, start=1):
        if not compressed and at >= piece.stop:
            return
        if line.strip():
            yield _json_document(line, number if compressed else at, text_key, 0 if compressed else len(line))
        at += len(line)


def _json_document(line: bytes, offset: int, text_key: str, size: int) -> Document:
    try:
        record = json.loads(line)
        text = record[text_key]
        if not isinstance(text, str):
            raise TypeError(f"{text_key!r} is {type(text).__name__}, not a string")
        text.encode("utf-8")  # a lone surrogate escape is valid JSON and no text
    except UnicodeDecodeError:
        return Document(text=None, offset=offset, problem="not UTF-8")
    except UnicodeEncodeError:
        return Document(text=None, offset=offset, problem=f"{text_key!r} holds a lone surrogate")
    except KeyError:
        return Document(text=None, offset=offset, problem=f"no field {text_key!r}")
    except (ValueError, TypeError) as error:
        return Document(text=None, offset=offset, problem=f"broken JSON line: {error}")
    return Document(text=text, offset=offset, bytes=size)
