"""Reads the documents in a range of an input file, one at a time, with their place in it."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, BinaryIO

from tools.data.compressed import compression, damage_of, open_bytes, wrong_kind
from tools.data.inputs import InputFile, InputRange, open_hub, table_problem
from tools.data.json_values import json_values

if TYPE_CHECKING:
    import pyarrow  # slow to import: only where it is needed

MAX_DOCUMENT_BYTES = 256 << 20  # a longer document would be longer than a shard
ROWS = 1000  # read at once from a table
FIELDS_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Document:
    text: str | None  # None: unreadable, for the reason in `problem`
    offset: int  # bytes from the start of the file; line number (from 1) if compressed; row number in a table
    problem: str = ""
    bytes: int = 0  # of input; 0 where that is not known for each document


def read_range(file: InputFile, part: InputRange, text_key: str) -> Iterator[Document]:
    """Yield the documents of one range, in order. The last one may say that the file is cut or damaged after the one before."""
    if file.kind == "dataset":
        yield from _disk_dataset(file.path, part, text_key)
    elif file.kind == "hub":
        yield from _hub_dataset(file, part, text_key)
    elif problem := wrong_kind(file.path):
        if not part.start:  # once a file
            yield Document(text=None, offset=0, problem=problem)
    else:
        last = part.start
        try:
            for document in _parquet(file, part, text_key) if file.kind == "parquet" else _documents(file, part, text_key):
                yield document
                last = document.offset
        except Exception as error:  # whatever a decompressor raises; what is no damage is raised again
            yield Document(text=None, offset=last, problem=f"the file is {damage_of(error, file.path)} after this place")


def _documents(file: InputFile, part: InputRange, text_key: str) -> Iterator[Document]:
    with open_bytes(file.path) as stream:
        if file.kind == "text":
            yield _decoded(stream.read(MAX_DOCUMENT_BYTES + 1).removeprefix(codecs.BOM_UTF8), 0)
        elif file.kind == "json":
            yield from _values(stream, text_key)
        else:
            yield from _lines(stream, file, part, text_key)


def _decoded(raw: bytes, offset: int) -> Document:
    if len(raw) > MAX_DOCUMENT_BYTES:
        return Document(text=None, offset=offset, problem=f"longer than {MAX_DOCUMENT_BYTES >> 20} MiB, the largest shard")
    try:
        return Document(text=raw.decode("utf-8"), offset=offset, bytes=len(raw))
    except UnicodeDecodeError as error:
        return Document(text=None, offset=offset, problem=f"not UTF-8 at its byte {error.start}")


def _lines(stream: BinaryIO, file: InputFile, part: InputRange, text_key: str) -> Iterator[Document]:
    """Yield the lines that begin inside the range, but for blank ones."""
    compressed = bool(compression(file.path))
    at = 0
    if part.start:
        stream.seek(part.start - 1)
        at = part.start - 1 + len(stream.readline())
    number = 0
    while compressed or at < part.stop:
        line = stream.readline(MAX_DOCUMENT_BYTES + 1)
        if not line:
            return
        number += 1
        offset, size = (number, 0) if compressed else (at, len(line))
        if not at:
            line = line.removeprefix(codecs.BOM_UTF8)
        at += size or len(line)
        if len(line) > MAX_DOCUMENT_BYTES:
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_DOCUMENT_BYTES)
                at += len(line)
            yield _decoded(b" " * (MAX_DOCUMENT_BYTES + 1), offset)
        elif file.kind == "lines" and line.strip():
            yield _decoded(line.rstrip(b"\r\n"), offset)
        elif line.strip():
            yield _json_document(line, offset, text_key, size)


def _json_document(line: bytes, offset: int, text_key: str, size: int) -> Document:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return Document(text=None, offset=offset, problem="not UTF-8")
    except (ValueError, RecursionError) as error:
        return Document(text=None, offset=offset, problem=f"broken JSON line: {error}")
    return _record(record, offset, text_key, size)


def _record(record: Any, offset: int, text_key: str, size: int = 0) -> Document:
    if not isinstance(record, dict):
        return Document(text=None, offset=offset, problem=f"broken JSON line: not an object but {type(record).__name__}")
    if text_key not in record:
        there = ", ".join(repr(key) for key in [*record][:FIELDS_SHOWN]) or "none"
        return Document(text=None, offset=offset, problem=f"no field {text_key!r} (there is {there}); choose with --text-key")
    return _checked(record[text_key], offset, text_key, size)


def _values(stream: BinaryIO, text_key: str) -> Iterator[Document]:
    """Yield the objects of arrays, or objects over several lines, by their numbers from 1."""
    number = 0
    try:
        for number, value in enumerate(json_values(stream), start=1):
            yield _record(value, number, text_key)
    except ValueError as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else f"broken JSON: {error}"
        yield Document(text=None, offset=number + 1, problem=f"{reason}; nothing after document {number} is read")


def _checked(text: object, offset: int, text_key: str, size: int = 0) -> Document:
    if not isinstance(text, str):
        return Document(text=None, offset=offset, problem=f"{text_key!r} is {type(text).__name__}, not a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate escape is valid JSON but not text
        return Document(text=None, offset=offset, problem=f"{text_key!r} holds a lone surrogate")
    return Document(text=text, offset=offset, bytes=size)


def _parquet(file: InputFile, part: InputRange, text_key: str) -> Iterator[Document]:
    import pyarrow.parquet

    if not file.parts:  # an empty table, or none
        if problem := table_problem(file.path, text_key):
            yield Document(text=None, offset=0, problem=problem)
        return
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            row = sum(table.metadata.row_group(group).num_rows for group in range(part.start))
            groups = list(range(part.start, part.stop))
            for batch in table.iter_batches(batch_size=ROWS, row_groups=groups, columns=[text_key]):
                yield from _cells(batch.column(0), row, text_key)
                row += len(batch)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise EOFError(str(error)) from error


def _cells(column: pyarrow.Array | pyarrow.ChunkedArray, first_row: int, text_key: str) -> Iterator[Document]:
    """Yield the documents of a table's column. Text that is not UTF-8 is found here: no library checks it on reading."""
    try:
        cells = column.to_pylist()
    except UnicodeDecodeError:
        cells = [_cell(cell) for cell in column]
    for row, cell in enumerate(cells, start=first_row):
        if isinstance(cell, UnicodeDecodeError):
            yield _not_utf8(cell, row, text_key)
        else:
            yield _checked(cell, row, text_key)


def _cell(cell: pyarrow.Scalar) -> object:
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        return error


def _not_utf8(error: UnicodeDecodeError, row: int, text_key: str) -> Document:
    return Document(text=None, offset=row, problem=f"{text_key!r} of this row is not UTF-8 at its byte {error.start}")


def _disk_dataset(path: str, part: InputRange, text_key: str) -> Iterator[Document]:
    import datasets

    rows = datasets.load_from_disk(path).with_format("arrow")
    for start in range(part.start, part.stop, ROWS):
        yield from _cells(rows[start : min(start + ROWS, part.stop)][text_key], start, text_key)


def _hub_dataset(file: InputFile, part: InputRange, text_key: str) -> Iterator[Document]:
    """Yield the rows of shards of a streamed dataset; an offset counts from the start of its shard: shard << 40 | row."""
    for shard in range(part.start, part.stop):
        rows = open_hub(file.path).shard(num_shards=file.parts, index=shard)
        row = 0
        try:
            for row, record in enumerate(rows, start=1):
                yield _checked(record.get(text_key), shard << 40 | row - 1, text_key)
        except UnicodeDecodeError as error:
            ended = _not_utf8(error, shard << 40 | row, text_key)
            yield replace(ended, problem=f"{ended.problem}; nothing of shard {shard} after row {row - 1} is read")
