"""What is in a checkpoint, tensor by tensor: statistics, differences, gaps. Streams: one block of rows is in memory at a time."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipes.common.checkpoint.files import damage, read_seal
from recipes.common.checkpoint.reader import Reader
from recipes.common.model.sharding import ShardSpec
from tools.common.console import UsageError, progress_bar

BLOCK_BYTES = 1 << 22
READERS = 4  # files read at once: one reader does not fill a fast disk


def open_checkpoint(folder: Path) -> Path:
    """The checkpoint's real folder (`latest` may move on meanwhile). Raises UsageError for what is none."""
    if (folder / "checkpoints").is_dir():
        raise UsageError(f"{folder} is a run directory; give one of its checkpoints, such as {folder / 'checkpoints' / 'latest'}")
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder; checkpoints are in RUN/checkpoints")
    return folder.resolve()


def damaged_files(folder: Path) -> list[str]:
    """What `damage` finds, with a progress bar. Raises CheckpointError when there is no seal to compare with."""
    files, wrong = read_seal(folder)["files"], []
    with (
        progress_bar(f"checking {folder.name}", sum(entry["bytes"] for entry in files.values())) as bar,
        ThreadPoolExecutor(READERS) as pool,  # reading and hashing both let other threads run
    ):
        found = pool.map(lambda index: damage(folder, share=(index, len(files))), range(len(files)))
        for name, lines in zip(sorted(files), found, strict=True):
            wrong += lines
            bar.update(files[name]["bytes"])
    return wrong


def damaged_weights(folder: Path) -> list[str]:
    """The same for what an export reads: every file's size, the small files, and the parts that hold weights. Optimizer states,
    two thirds of the bytes, are left alone."""
    wrong = missized_files(folder)
    files = sorted(read_seal(folder)["files"])
    small = [index for index, name in enumerate(files) if not name.endswith(".safetensors")]
    for index in small if not wrong else ():
        wrong += damage(folder, share=(index, len(files)))
    if wrong:
        return wrong
    reader = Reader(folder)
    weights = sum(4 * elements(reader, name) for name in reader.names("master"))
    with progress_bar(f"checking {folder.name}", weights) as bar:
        for kind in ("master", "buffer"):
            for count, found in reader.damaged_parts(kind):
                wrong += [found] if found else []
                bar.update(count)
    return wrong


def missized_files(folder: Path) -> list[str]:
    """The same by sizes alone: quick, and blind to flipped bits."""
    found = []
    for name, entry in sorted(read_seal(folder)["files"].items()):
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            found.append(f"{path}: {'missing' if size is None else f'{size} bytes'}, {entry['bytes']} were written")
    return found


def row_blocks(reader: Reader, name: str, kind: str) -> Iterator[np.ndarray]:
    """A tensor in blocks of whole rows, about 4 MB each; a scalar is one block."""
    shape = reader.shape(name)
    if not shape:
        yield reader.whole(name, kind)
        return
    rows = max(1, BLOCK_BYTES // (4 * max(1, math.prod(shape[1:]))))
    for first in range(0, shape[0], rows):
        yield reader.rows(name, kind, first, min(first + rows, shape[0]))


def elements(reader: Reader, name: str) -> int:
    return math.prod(reader.shape(name))


@dataclass(frozen=True)
class TensorStats:
    """Of one tensor and kind. norm, min, max: over its finite elements (None where there is none)."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    norm: float
    min: float | None
    max: float | None
    zeros: int
    non_finite: int


def tensor_stats(reader: Reader, name: str, kind: str) -> TensorStats:
    squares, low, high, zeros, bad = 0.0, math.inf, -math.inf, 0, 0
    for block in row_blocks(reader, name, kind):
        values = block.reshape(-1)
        finite = np.isfinite(values)
        if not finite.all():
            bad += values.size - int(finite.sum())
            values = values[finite]
        if values.size:
            low, high = min(low, float(values.min())), max(high, float(values.max()))
            zeros += values.size - int(np.count_nonzero(values))
            squares += _sum_of_squares(values)
    dtype = reader.tensors[name]["kinds"][kind]["dtype"]
    found = low <= high
    return TensorStats(
        name, kind, reader.shape(name), dtype, math.sqrt(squares), low if found else None, high if found else None, zeros, bad
    )


def _sum_of_squares(values: np.ndarray) -> float:
    """In float64, without a float64 copy of the whole block."""
    return sum(float(np.square(piece, dtype=np.float64).sum()) for piece in np.array_split(values, values.size // (1 << 20) + 1))


def matching(reader: Reader, pattern: str | None) -> list[str]:
    """Names that hold `pattern`, or match it where it has wildcards."""
    if pattern is None:
        return list(reader.tensors)
    glob = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    return [name for name in reader.tensors if fnmatch.fnmatchcase(name, glob)]


@dataclass(frozen=True)
class Difference:
    """Of one tensor and kind between two checkpoints."""

    name: str
    kind: str
    elements: int
    changed: int  # elements whose values differ; two NaN are equal
    largest: float  # of |a - b|
    relative: float  # |a - b| / max(|a|, |b|), Euclidean norms


def tensor_difference(a: Reader, b: Reader, name: str, kind: str) -> Difference:
    """Both must have the tensor in one shape. A number against NaN or infinity is an infinite difference."""
    changed, largest, difference, of_a, of_b = 0, 0.0, 0.0, 0.0, 0.0
    for left, right in zip(row_blocks(a, name, kind), row_blocks(b, name, kind), strict=True):
        different = ~((left == right) | ((left != left) & (right != right)))
        changed += int(different.sum())
        of_a, of_b = of_a + _sum_of_squares(left), of_b + _sum_of_squares(right)
        if different.any():
            gap = left[different].astype(np.float64) - right[different].astype(np.float64)
            gap = np.where(np.isfinite(gap), np.abs(gap), np.inf)
            largest = max(largest, float(gap.max()))
            difference += float(np.square(gap).sum())
    scale = math.sqrt(max(of_a, of_b))
    relative = 0.0 if not changed else math.sqrt(difference) / scale if 0 < scale < math.inf else math.inf
    return Difference(name, kind, elements(a, name), changed, largest, relative)


def compare(a: Reader, b: Reader, bar: Any) -> dict[str, Any]:
    """Everything that is not equal in two checkpoints; "differences" come with the largest relative one first."""
    only_a, only_b, shapes, found = [], [], [], []
    for name in sorted(a.tensors.keys() | b.tensors.keys()):
        kinds_a = set(a.tensors.get(name, {}).get("kinds", ()))
        kinds_b = set(b.tensors.get(name, {}).get("kinds", ()))
        only_a += [f"{kind} {name}" for kind in sorted(kinds_a - kinds_b)]
        only_b += [f"{kind} {name}" for kind in sorted(kinds_b - kinds_a)]
        if kinds_a & kinds_b and a.shape(name) != b.shape(name):
            shapes.append(f"{name}: {list(a.shape(name))} and {list(b.shape(name))}")
            continue
        for kind in sorted(kinds_a & kinds_b):
            difference = tensor_difference(a, b, name, kind)
            found += [difference] if difference.changed else []
            bar.update(8 * difference.elements)
    found.sort(key=lambda d: (-d.relative, -d.largest, d.name, d.kind))
    keys = sorted(a.state.keys() | b.state.keys())
    state = {key: [a.state.get(key), b.state.get(key)] for key in keys if a.state.get(key) != b.state.get(key)}
    return {
        "differences": [asdict(difference) for difference in found],
        "only_in_a": only_a,
        "only_in_b": only_b,
        "other_shape": shapes,
        "state": state,
    }


def gaps(reader: Reader) -> list[str]:
    """Elements that the index says are nowhere or twice, a line for each tensor and kind."""
    found = []
    for name, entry in reader.tensors.items():
        cut = None if entry["cut"] is None else ShardSpec(*entry["cut"])
        for kind, of_kind in entry["kinds"].items():
            for rank in range(entry["tensor"] if cut else 1):
                runs = [(start, stop) for _, _, where, start, stop, _ in of_kind["parts"] if where == rank]
                place = 0
                for start, stop in sorted(runs):
                    if start != place:
                        break
                    place = stop
                whole = _stored_elements(tuple(entry["shape"]), cut, rank, entry["tensor"])
                if place != whole:
                    found.append(
                        f"{reader.folder / 'index.json'}: {kind} {name} has a gap or overlap at element {place} of {whole}"
                    )
    return found


def _stored_elements(shape: tuple[int, ...], cut: ShardSpec | None, rank: int, size: int) -> int:
    """Of a tensor rank's flattened shard, without the padding at its end."""
    if cut is None:
        return math.prod(shape)
    local = list(shape)
    local[cut.dim] = cut.local_length(shape[cut.dim], size)
    if cut.dim == 0 and cut.packs == 1:
        local[0] = sum(count for _, _, count in cut.ranges(shape[0], rank, size))
    return math.prod(local)
