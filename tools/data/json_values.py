"""Reads JSON files of documents: lines, arrays, or objects that go over several lines, told apart by their content."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from tools.data.compressed import damage_of, open_bytes, uncompressed, wrong_kind

HEAD_BYTES = 1 << 16
READ_CHARACTERS = 1 << 20
MAX_CHARACTERS = 256 << 20  # a longer value would be longer than a shard
_GAP = re.compile(r"[\s,]*")


def is_one_value_a_line(path: str) -> bool:
    """Return whether a file is JSON lines: it begins with no array and, where its name is .json, not objects over several lines.

    A file that cannot be read is taken for JSON lines; their reader says what is wrong with it.
    """
    try:
        with open_bytes(path) as stream:
            head = stream.read(HEAD_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
    except Exception as error:  # whatever a decompressor raises
        damage_of(error, path)
        return True
    if head.startswith(b"["):
        return False
    if not uncompressed(path).lower().endswith(".json"):
        return True
    first, *rest = [line for line in head.split(b"\n") if line.strip()][:2] or [b""]
    return not rest or _is_object(first) or rest[0].lstrip().startswith(b"{")  # a broken first line, perhaps


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def first_value(path: str) -> Any:
    """Return the first value of a JSON file, in an array or not; None if it has none. Raises ValueError if it is not readable."""
    if wrong_kind(path):
        raise ValueError(wrong_kind(path))
    try:
        with open_bytes(path) as stream:
            return next(json_values(stream), None)
    except ValueError:
        raise
    except Exception as error:  # whatever a decompressor raises
        raise ValueError(damage_of(error, path)) from error


def json_values(stream: BinaryIO) -> Iterator[Any]:
    """Yield values one after another, and for an array among them the values in it; a value at a time is in memory.

    Raises ValueError where they are no JSON, or an array is not closed.
    """
    reader = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    decoder = json.JSONDecoder()
    text, at, ended, in_array = "", 0, False, False
    while True:
        at = _GAP.match(text, at).end()
        if at < len(text):
            if text[at] == "[]"[in_array]:  # the array begins, or ends
                in_array, at = not in_array, at + 1
                continue
            try:
                value, at = decoder.raw_decode(text, at)
            except RecursionError:
                raise ValueError("nested too deeply") from None
            except json.JSONDecodeError as error:
                if ended or _surely_wrong(error, text) or len(text) - at > MAX_CHARACTERS:
                    raise
            else:
                yield value
                continue
        elif ended:
            if in_array:
                raise ValueError("the array has no end")
            return
        more = reader.read(max(READ_CHARACTERS, len(text) - at))
        text, at, ended = text[at:] + more, 0, not more


def _surely_wrong(error: json.JSONDecodeError, text: str) -> bool:
    """Return whether more text cannot cure the error: it is not at the end of what was read, nor in an open string."""
    return error.pos < len(text) - 32 and not error.msg.startswith("Unterminated")
