"""Opens checkpoints, finds what is damaged or missing in them, and streams their tensors in blocks of rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from recipes.common.checkpoint.files import damage, read_seal
from recipes.common.checkpoint.reader import Reader
from tools.common.console import UsageError, progress_bar

BLOCK_BYTES = 1 << 22
READERS = 4  # files read at once: one reader does not fill a fast disk


def open_checkpoint(folder: Path) -> Path:
    """Return the checkpoint's real folder (`latest` may move on meanwhile). Raises UsageError when it is none."""
    if (folder / "checkpoints").is_dir():
        raise UsageError(f"{folder} is a run directory; give one of its checkpoints, such as {folder / 'checkpoints' / 'latest'}")
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder; checkpoints are in RUN/checkpoints")
    return folder.resolve()


def checkpoint_folders(run: Path) -> list[Path]:
    """Return every checkpoint of a run, unfinished ones too. Raises UsageError when `run` is no run directory."""
    if not (run / "checkpoints").is_dir():
        raise UsageError(f"{run} is no run directory: it has no folder `checkpoints`")
    return sorted(path for path in (run / "checkpoints").iterdir() if path.is_dir() and not path.is_symlink())


def damaged_files(folder: Path) -> list[str]:
    """Read every file and list what `damage` finds. Raises CheckpointError when there are no checksums to compare with."""
    files, wrong = read_seal(folder)["files"], []
    with (
        progress_bar(f"checking {folder.name}", sum(entry["bytes"] for entry in files.values())) as bar,
        ThreadPoolExecutor(READERS) as pool,  # reading and hashing both let other threads run
    ):
        found = pool.map(lambda index: damage(folder, stride=(index, len(files))), range(len(files)))
        for name, lines in zip(sorted(files), found, strict=True):
            wrong += lines
            bar.update(files[name]["bytes"])
    return wrong


def damaged_weights(folder: Path) -> list[str]:
    """List what is damaged in the files that an export reads: every file's size, the small files, and the parts with weights.

    Optimizer states, two thirds of the bytes, are not read.
    """
    wrong = missized_files(folder)
    files = sorted(read_seal(folder)["files"])
    small = [index for index, name in enumerate(files) if not name.endswith(".safetensors")]
    for index in small if not wrong else ():
        wrong += damage(folder, stride=(index, len(files)))
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
    """List the files of a wrong size: quick, and blind to flipped bits."""
    found = []
    for name, entry in sorted(read_seal(folder)["files"].items()):
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            found.append(f"{path}: {'missing' if size is None else f'{size} bytes'}, {entry['bytes']} were written")
    return found


def row_blocks(reader: Reader, name: str, kind: str) -> Iterator[np.ndarray]:
    """Yield a tensor in blocks of whole rows, about 4 MB each; a scalar is one block."""
    shape = reader.shape(name)
    if not shape:
        yield reader.whole(name, kind)
        return
    rows = max(1, BLOCK_BYTES // (4 * max(1, math.prod(shape[1:]))))
    for first in range(0, shape[0], rows):
        yield reader.rows(name, kind, first, min(first + rows, shape[0]))


def elements(reader: Reader, name: str) -> int:
    return math.prod(reader.shape(name))


def sum_of_squares(values: np.ndarray) -> float:
    """Return the sum in float64, without a float64 copy of the whole block."""
    return sum(float(np.square(part, dtype=np.float64).sum()) for part in np.array_split(values, values.size // (1 << 20) + 1))


def gaps(reader: Reader) -> list[str]:
    """List the elements that the index has nowhere or twice, a line for each tensor and kind."""
    found = []
    for name, entry in reader.tensors.items():
        for kind, of_kind in entry["kinds"].items():
            for shard in reader.written_shards(name):
                runs = [(start, stop) for _, _, rank, start, stop, _ in of_kind["parts"] if rank == shard.rank]
                place = 0
                for start, stop in sorted(runs):
                    if start != place:
                        break
                    place = stop
                whole = shard.stored_elements(reader.shape(name))
                if place != whole:
                    found.append(
                        f"{reader.folder / 'index.json'}: {kind} {name} has a gap or overlap at element {place} of {whole}"
                    )
    return found
