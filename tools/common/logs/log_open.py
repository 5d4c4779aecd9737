"""Opens a log whatever it is packed with and encoded in, and says what a file is that is no log."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TextIO

FIRST_BYTES = 4096
_PACKERS: dict[bytes, Callable[[Path], BinaryIO]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
# first bytes -> what it is; not what it is called, as names lie
_KINDS = {
    b"\x1f\x8b": "packed with gzip twice: unpack it once",
    b"\x28\xb5\x2f\xfd": "packed with zstd: unpack it first (zstd -d)",
    b"PK\x03\x04": "a zip archive (a PyTorch or numpy file, a spreadsheet or packed files): unpack it, or save it as CSV",
    b"PAR1": "a Parquet file: save it as CSV",
    b"SQLite format 3": "an SQLite database: save the table as CSV",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a numpy array",
    b"%PDF": "a PDF",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"\x80\x02": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"\x7fELF": "a program",
}


def open_text(path: Path) -> TextIO:
    """Open a text file, packed with gzip, bzip2, xz or not, whatever its name. Bytes that are no text do not stop the reading.

    UTF-8, or UTF-16 where its first bytes say so (PowerShell writes it). A byte order mark is no part of the text.
    """
    with path.open("rb") as file:
        first = file.read(8)
    opener = next((opener for magic, opener in _PACKERS.items() if first.startswith(magic)), None)
    if opener is not None:
        with opener(path) as unpacked:
            first = unpacked.read(2)
    encoding = "utf-16" if first[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    if opener is not None:
        return io.TextIOWrapper(opener(path), encoding=encoding, errors="replace", newline="")
    return path.open(encoding=encoding, errors="replace", newline="")


def describe(path: Path) -> str:
    """Return what a file seems to be, for a message that no log was found in it."""
    with path.open("rb") as file:
        first = file.read(FIRST_BYTES)
    opener = next((opener for magic, opener in _PACKERS.items() if first.startswith(magic)), None)
    if opener is not None:
        with opener(path) as unpacked:
            first = unpacked.read(FIRST_BYTES)
    kind = next((kind for magic, kind in _KINDS.items() if first.startswith(magic)), None)
    if kind is not None:
        return kind
    if first[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    if first[8:9] == b"{" and b"\0" in first[:8]:
        return "a safetensors file"
    if b"\0" in first and first[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        return "a binary file"
    with open_text(path) as text:
        start = text.read(FIRST_BYTES)
    if start.lstrip()[:14].lower().startswith(("<!doctype", "<html")):
        return "a web page"
    line = start.lstrip().split("\n", 1)[0].strip()
    names = line.split(delimiter_of(line))
    if len(names) > 2 and all(name.strip() and not name.strip()[0].isdigit() for name in names):
        return f"text that begins with the columns {', '.join(names[:8])}, or with words"
    return f"text that begins with {json.dumps(line[:60], ensure_ascii=False)}"


def delimiter_of(header: str) -> str:
    """Return what separates the cells of a table: a comma, or a tab or semicolon where its header has more of these."""
    return max(",\t;", key=header.count)
