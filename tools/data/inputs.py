"""Finds the inputs of tools.data prepare, and divides them into units of work.

A unit is a list of ranges of files. It depends on the inputs alone, never on the number of processes, so the same inputs give
the same shards anywhere. tools.data.readers reads the ranges.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.common.config.json_files import laid_out, read_json
from tools.common.console import UsageError
from tools.data.compressed import compression, is_pointer, uncompressed, wrong_kind
from tools.data.json_values import first_value, is_one_value_a_line
from tools.data.walk import SKIPPED_FOLDERS, LeftOut, walk

if TYPE_CHECKING:
    import datasets  # slow to import: only where it is needed

TEXT_ENDINGS = (".txt", ".text", ".md")
JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
# endings of a file named as an INPUT that is surely no text -> what to do with it
TABLE = "write the table as Parquet (pandas: read_csv(...).to_parquet(...)), or choose --suffix {ending} to read it as text"
ARROW = "load it with `datasets` and give the folder that save_to_disk writes, or a .parquet file"
PACKED = "unpack it, and give the folder"
NUMBERS = "give the text that it was made from"
NOT_TEXT = {".csv": TABLE, ".tsv": TABLE, ".arrow": ARROW, ".feather": ARROW, ".orc": ARROW}
NOT_TEXT |= dict.fromkeys((".zip", ".tar", ".tgz", ".tbz2", ".7z", ".rar"), PACKED)
NOT_TEXT |= dict.fromkeys((".bin", ".idx", ".npy", ".npz", ".pt", ".pkl", ".h5", ".safetensors"), NUMBERS)
HUB = "hub:"  # prefix of an INPUT that is a dataset by name
_OPEN_FILE = re.compile(r"/dev/stdin$|/dev/fd/|/proc/[^/]+/fd/")  # another process has another there
MIN_UNIT_BYTES = 1 << 20
MAX_UNIT_BYTES = 256 << 20
UNITS = 64  # aimed at between those two


@dataclass(frozen=True, kw_only=True)
class InputFile:
    path: str  # "hub:NAME:CONFIG:SPLIT" for a dataset by name
    source: int  # number of the INPUT argument it came from
    kind: str  # "text", "lines", "jsonl", "json" (arrays, or objects over lines), "parquet", "dataset" (on disk) or "hub"
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


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the user chose of the inputs."""

    suffixes: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    text_key: str = "text"
    each_line: bool = False
    json_as_text: bool = False
    skip_bad: bool = False
    out: Path | None = None  # the folder that is written: never an input


def list_files(inputs: list[str], choice: Choice) -> tuple[list[InputFile], list[str]]:
    """List every file to read, in a fixed order, and say what is left out, a line for each input.

    Raises UsageError naming each input that is missing, unknown or empty, and each file that is not what its name says.
    """
    found: list[InputFile] = []
    problems, lines = [], []
    for source, name in enumerate(inputs):
        left, here, wrong = LeftOut(), [], []
        try:
            for file in _files_of(name, source, choice, left):
                here.append(file)
                if why := _early_problem(file, choice):
                    wrong.append(f"{file.path}: {why}")
        except UsageError as error:
            problems.append(str(error))
            continue
        problems += wrong[:5] + ([f"{name}: ... and {len(wrong) - 5} more such files"] if len(wrong) > 5 else [])
        if not here:
            wanted = " ".join(choice.suffixes or (*TEXT_ENDINGS, *JSON_ENDINGS, ".parquet"))
            there = f"; there is {left.text()}" if left.counts else ""
            problems.append(f"{name}: holds no file ending in {wanted}{there}; choose with --suffix")
        elif left.counts:
            lines.append(f"left out of {name}: {left.text()}")
        found += here
    if problems:
        raise UsageError("\n  ".join(problems))
    return found, lines


def _files_of(name: str, source: int, choice: Choice, left: LeftOut) -> Iterator[InputFile]:
    if name.startswith(HUB):
        yield _hub_dataset(name, source, choice.text_key)
        return
    root = Path(name)
    if not root.exists():
        raise UsageError(f"{name}: no such file or folder (a dataset of the Hugging Face hub is written {HUB}NAME)")
    if _is_stream(root):
        raise UsageError(f"{name}: a stream (a pipe, device, socket or open file), no file or folder; write it to a file first")
    if (root / "dataset_dict.json").is_file():
        raise UsageError(f"{name}: holds several splits; give the folder of one, such as {root / 'train'}")
    if (root / "state.json").is_file() and (root / "dataset_info.json").is_file():
        yield _disk_dataset(root, source, choice.text_key)
        return
    for path in walk(root, {*choice.excluded, *SKIPPED_FOLDERS}, left, choice.out) if root.is_dir() else [root]:
        kind = _kind(path, choice, named=not root.is_dir(), left=left)
        if kind:
            state = path.stat()
            parts = _row_groups(path) if kind == "parquet" else 0
            yield InputFile(
                path=str(path), source=source, kind=kind, bytes=state.st_size, changed_ns=state.st_mtime_ns, parts=parts
            )


def _is_stream(root: Path) -> bool:
    """Return whether an INPUT can be read once only, or by this process only: `<(...)`, /dev/stdin, a FIFO, a device."""
    return not (root.is_file() or root.is_dir()) or bool(_OPEN_FILE.match(str(root.absolute())))


def _kind(path: Path, choice: Choice, *, named: bool, left: LeftOut) -> str:
    """Return the kind of a file, or "" for one that is left out. named: as an INPUT, not found in a folder."""
    lower = path.name.lower()
    plain = uncompressed(lower)
    chosen = bool(choice.suffixes) and lower.endswith(tuple(suffix.lower() for suffix in choice.suffixes))
    text = "lines" if choice.each_line else "text"
    if choice.suffixes and not chosen and not named:
        left.add_ending(path)
        return ""
    if plain.endswith(".parquet"):
        return "parquet"
    if plain.endswith(JSON_ENDINGS) and not (choice.json_as_text and plain.endswith(".json")):
        if not named and not chosen and plain.endswith(".json") and not _holds_documents(path, choice.text_key):
            left.add(f".json without a field {choice.text_key!r}", path)  # package.json and the like
            return ""
        return "jsonl" if is_one_value_a_line(str(path)) else "json"
    cure = NOT_TEXT.get(Path(plain).suffix)
    if named and not chosen and cure:
        ending = Path(plain).suffix
        raise UsageError(f"{path}: {ending} is not read as text; {cure.format(ending=ending)}")
    if not named and not chosen and not plain.endswith(TEXT_ENDINGS):
        left.add_ending(path)  # a folder may hold other files; one that was named, or chosen by --suffix, is text
        return ""
    return text


def _holds_documents(path: Path, text_key: str) -> bool:
    """Return whether the first value of a .json file is an object with the text, or is not readable, which is told later."""
    try:
        value = first_value(str(path))
    except ValueError:
        return True
    return isinstance(value, dict) and text_key in value


def _early_problem(file: InputFile, choice: Choice) -> str:
    """Return what is wrong with a file that its size, its first bytes or its table's head show; "" if nothing."""
    if file.kind in ("dataset", "hub") or (choice.skip_bad and not file.parts):  # the reader will say so, and go on
        return ""
    if is_pointer(file.path, file.bytes) or (compression(file.path) and not file.bytes):
        return wrong_kind(file.path)
    return table_problem(file.path, choice.text_key) if file.kind == "parquet" else ""


def _row_groups(path: Path) -> int:
    """Return the number of row groups; 0 for a file that is no Parquet, which the reader says."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            return file.num_row_groups
    except (pyarrow.ArrowInvalid, OSError):
        return 0


def table_problem(path: str, text_key: str) -> str:
    """Return why a Parquet file cannot be read; "" if it can."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
    except (pyarrow.ArrowInvalid, OSError) as error:
        return f"not a Parquet file ({error}){'; decompress it' if compression(path) else ''}"
    return "" if text_key in columns else f"no column {text_key!r} among {columns}; choose with --text-key"


def _disk_dataset(folder: Path, source: int, text_key: str) -> InputFile:
    import datasets

    rows = datasets.load_from_disk(str(folder))
    _check_columns(str(folder), rows.column_names, text_key)
    with laid_out(folder / "state.json"):
        states = [(folder / entry["filename"]).stat() for entry in read_json(folder / "state.json")["_data_files"]]
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
    elif file.kind in ("jsonl", "lines") and not compression(file.path):
        step, end = unit_bytes, file.bytes
    else:
        step, end = max(file.bytes, 1), file.bytes
    for start in range(0, max(end, 1), step):  # an empty file has a range too: it counts as an empty document
        stop = min(start + step, end)
        size = file.bytes * stop // max(end, 1) - file.bytes * start // max(end, 1)
        yield InputRange(file=number, start=start, stop=stop, bytes=size)
