"""Opens the files of tools.data decompressed, by their endings, and says what a file is that is not what its name says."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zlib
from typing import BinaryIO

ENDINGS = (".gz", ".zst", ".xz", ".bz2")
CURE = "Pass --bad skip to leave such documents out"
POINTER = b"version https://git-lfs.github.com/spec/"
POINTER_BYTES = 1024  # a Git LFS pointer is smaller
HEAD_BYTES = 64
ZSTD_BYTES = 1 << 16  # read at once; where a file is damaged, what was decompressed of one read is lost
_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"\xfd7zXZ\x00": ".xz", b"BZh": ".bz2"}
_MARKS = {b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_DAMAGED = (EOFError, zlib.error, lzma.LZMAError)  # and OSError without a number


def compression(name: str) -> str:
    """Return the ending in ENDINGS that a file's name has, in upper or lower case; "" if none."""
    ending = os.path.splitext(name)[1].lower()
    return ending if ending in ENDINGS else ""


def uncompressed(name: str) -> str:
    """Return the name without the ending of its compression."""
    return name[: len(name) - len(compression(name))]


def open_bytes(path: str) -> BinaryIO:
    """Open the file, decompressed according to its ending."""
    match compression(path):
        case ".gz":
            return gzip.open(path, "rb")
        case ".xz":
            return lzma.open(path, "rb")
        case ".bz2":
            return bz2.open(path, "rb")
        case ".zst":
            import pyarrow

            return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"), ZSTD_BYTES)
    return open(path, "rb", buffering=1 << 20)


def wrong_kind(path: str) -> str:
    """Return why the whole file cannot be read as what its name says, by its first bytes; "" if they say nothing."""
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    if head.startswith(POINTER):
        return "a Git LFS pointer, not the file itself; fetch it with: git lfs pull"
    ending = compression(path)
    if ending and not head:
        return f"empty, not even a {ending} header; fetch it again"
    found = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), "")
    if found == ".bz2" and head[4:10] != b"1AY&SY":  # a text may begin with BZh
        found = ""
    if found != ending and (found or ending):
        was = f"{found} data" if found else "not compressed"
        return f"{was}, whatever its name says; rename it to end in {uncompressed(os.path.basename(path))}{found}"
    if not ending:
        mark = next((name for mark, name in _MARKS.items() if head.startswith(mark)), "")
        if mark:
            return f"{mark}, not UTF-8 (by its byte order mark); convert it with: iconv -f {mark} -t UTF-8"
    return ""


def is_pointer(path: str, size: int) -> bool:
    """Return whether a file of `size` bytes is a Git LFS pointer: the name of a file that was not fetched."""
    if not len(POINTER) < size < POINTER_BYTES:
        return False
    with open(path, "rb") as file:
        return file.read(len(POINTER)) == POINTER


def damage_of(error: Exception, path: str) -> str:
    """Return what is wrong with the content of a file that raised `error`. Raises what is no damage, with the file's name."""
    if isinstance(error, OSError) and error.errno is not None:  # the disk or the network, not the file
        raise OSError(error.errno, error.strerror, path) from error
    if isinstance(error, (OSError, *_DAMAGED)):
        return f"cut short or damaged ({error})"
    raise error
