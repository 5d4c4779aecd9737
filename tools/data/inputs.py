"""Finds the inputs of tools.data prepare, and divides them into units of work.

A unit is a list of ranges of files. It depends on the inputs alone, never on the number of processes, so the same inputs give
the same shards anywhere. tools.data.readers reads the ranges.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tools.common.console import UsageError

if TYPE_CHECKING:
    import datasets  # slow to import: only where it is needed

SKIPPED_FOLDERS = ("site-packages", "dist-packages", "__pycache__")  # skipped inside an input folder, as hidden ones are
TEXT_ENDINGS = (".txt", ".text", ".md")
JSON_ENDINGS = (".jsonl", ".ndjson")
COMPRESSED_ENDINGS = (".gz", ".zst")
HUB = "hub:"  # prefix of an INPUT that is a dataset by name
MIN_UNIT_BYTES = 1 << 20
MAX_UNIT_BYTES = 256 << 20
UNITS = 64  # aimed at between those two


@dataclass(frozen=True, kw_only=True)
class InputFile:
    path: str  # "hub:NAME:CONFIG:SPLIT" for a dataset by name
    source: int  # number of the INPUT argument it came from
    kind: str  # "text", "lines", "jsonl", "parquet", "dataset" (on disk) or "hub"
    bytes: int
    changed_ns: int  # modification time, to notice that an input changed
    parts: int = 0  # row groups (parquet), rows (dataset), shards (hub); 0 where ranges count bytes


@dataclass(frozen=True, kw_only=True)
class InputRange:
    """Parts [start, stop) of one file: bytes of plain lines, `InputFile.parts` where it has any; otherwise the whole file."""

    file: int
    start: int
    stop: int
    bytes: int  # of input, for the progress bar


def uncompressed(name: str) -> str:
    for ending in COMPRESSED_ENDINGS:
        name = name.removesuffix(ending)
    return name


def list_files(inputs: list[str], suffixes: list[str], excluded: list[str], text_key: str, each_line: bool) -> list[InputFile]:
    """List every file to read, in a fixed order. Raises UsageError naming each input that is missing, unknown or empty."""
    found: list[InputFile] = []
    problems = []
    for source, name in enumerate(inputs):
        before = len(found)
        try:
            found += _files_of(name, source, suffixes, excluded, text_key, each_line)
        except UsageError as error:
            problems.append(str(error))
            continue
        if len(found) == before:
            wanted = " ".join(suffixes or (*TEXT_ENDINGS, *JSON_ENDINGS, ".parquet"))
            problems.append(f"{name}: holds no file ending in {wanted}; choose with --suffix")
    if problems:
        raise UsageError("\n  ".join(problems))
    return found


def _files_of(
    name: str, source: int, suffixes: list[str], excluded: list[str], text_key: str, each_line: bool
) -> Iterator[InputFile]:
    if name.startswith(HUB):
        yield _hub_dataset(name, source, text_key)
        return
    root = Path(name)
    if not root.exists():
        raise UsageError(f"{name}: no such file or folder (a dataset of the Hugging Face hub is written {HUB}NAME)")
    if (root / "dataset_dict.json").is_file():
        raise UsageError(f"{name}: holds several splits; give the folder of one, such as {root / 'train'}")
    if (root / "state.json").is_file() and (root / "dataset_info.json").is_file():
        yield _disk_dataset(root, source, text_key)
        return
    for path in _walk(root, set(excluded) | set(SKIPPED_FOLDERS)):
        if root.is_dir() and suffixes and not path.name.endswith(tuple(suffixes)):
            continue
        plain = uncompressed(path.name.lower())
        kind, parts = "lines" if each_line else "text", 0
        if plain.endswith(JSON_ENDINGS):
            kind = "jsonl"
        elif plain.endswith(".parquet"):
            kind, parts = "parquet", _row_groups(path, text_key)
        elif root.is_dir() and not suffixes and not plain.endswith(TEXT_ENDINGS):
            continue  # a folder may hold other files; one that was named, or chosen by --suffix, is text
        state = path.stat()
        yield InputFile(path=str(path), source=source, kind=kind, bytes=state.st_size, changed_ns=state.st_mtime_ns, parts=parts)


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


def _row_groups(path: Path, text_key: str) -> int:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            groups = file.num_row_groups
    except pyarrow.ArrowInvalid as error:
        raise UsageError(f"{path}: not a Parquet file ({error})") from error
    if text_key not in columns:
        raise UsageError(f"{path}: no column {text_key!r} among {columns}; choose with --text-key")
    return groups


def _disk_dataset(folder: Path, source: int, text_key: str) -> InputFile:
    import datasets

    rows = datasets.load_from_disk(str(folder))
    _check_columns(str(folder), rows.column_names, text_key)
    names = [entry["filename"] for entry in json.loads((folder / "state.json").read_text())["_data_files"]]
    states = [(folder / name).stat() for name in names]
    return InputFile(
        path=str(folder),
        source=source,
        kind="dataset",
        bytes=sum(state.st_size for state in states),
        changed_ns=max((state.st_mtime_ns for state in states), default=0),
        parts=len(rows),
    )


def _hub_dataset(name: str, source: int, text_key: str) -> InputFile:
    rows = open_hub(name)
    if rows.column_names is not None:
        _check_columns(name, rows.column_names, text_key)
    shards = rows.num_shards
    return InputFile(path=name, source=source, kind="hub", bytes=shards, changed_ns=0, parts=shards)


def open_hub(name: str) -> datasets.IterableDataset:
    """Open the streamed dataset `hub:NAME[:CONFIG[:SPLIT]]` (split "train" unless given)."""
    import datasets

    path, config, split = [*name.removeprefix(HUB).split(":"), "", ""][:3]
    try:
        return datasets.load_dataset(path, config or None, split=split or "train", streaming=True)
    except Exception as error:  # the library raises many kinds
        raise UsageError(f"{name}: {type(error).__name__}: {error}") from error


def _check_columns(name: str, columns: list[str], text_key: str) -> None:
    if text_key not in columns:
        raise UsageError(f"{name}: no column {text_key!r} among {columns}; choose with --text-key")


def plan_units(files: list[InputFile]) -> list[list[InputRange]]:
    """Divide the files into units of work of about equal size, each a list of ranges in order."""
    unit_bytes = min(max(sum(file.bytes for file in files) // UNITS, MIN_UNIT_BYTES), MAX_UNIT_BYTES)
    units: list[list[InputRange]] = [[]]
    filled = 0
    for number, file in enumerate(files):
        for part in _ranges(number, file, unit_bytes):
            if filled and filled + part.bytes > unit_bytes:
                units.append([])
                filled = 0
            units[-1].append(part)
            filled += max(part.bytes, 1)
    return units


def _ranges(number: int, file: InputFile, unit_bytes: int) -> Iterator[InputRange]:
    """Yield the ranges of one file: one only where it is compressed, or a single document."""
    if file.kind == "hub":
        step, end = 1, file.parts
    elif file.parts:
        step, end = max(file.parts * unit_bytes // max(file.bytes, 1), 1), file.parts
    elif file.kind in ("jsonl", "lines") and not file.path.endswith(COMPRESSED_ENDINGS):
        step, end = unit_bytes, file.bytes
    else:
        step, end = max(file.bytes, 1), file.bytes
    for start in range(0, max(end, 1), step):  # an empty file has a range too: it counts as an empty document
        stop = min(start + step, end)
        size = file.bytes * stop // max(end, 1) - file.bytes * start // max(end, 1)
        yield InputRange(file=number, start=start, stop=stop, bytes=size)
