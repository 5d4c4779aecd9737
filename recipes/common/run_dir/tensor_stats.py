"""Writes and reads `tensor_stats/`: per-tensor statistics of a run in columns. Rank 0 writes, tools read.

Arrow IPC streams (arrow.apache.org/docs/format/Columnar.html), each a schema and then one record batch a step: an int64 `step`
and, for each statistic, a list of float32, one for each parameter (or layer). Only whole batches are read, so `kill -9` loses
the step that was being written, at most. A file is named after the first step that it may hold:

    parameters_00000001.arrow    every step that the monitor measures: grad_norm, weight_norm, ... by parameter
    activations_00000001.arrow   rarer: activation_rms, max_attention_logit, router_load_max by layer
    routers_00000001.arrow       every step: load_evenness, entropy, dead by router; of mixtures of experts
    experts_00000001.arrow       as rare as activations: load by router and expert

Where a run resumed from an earlier step, the new file's name says from which step on older files no longer count; later files are
renamed. Nothing is deleted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

FOLDER = "tensor_stats"
PARAMETERS, ACTIVATIONS, ROUTERS, EXPERTS = "parameters", "activations", "routers", "experts"
FILE_STEPS = 1000  # records in a file: a reader opens few files, and none that it does not need
_NAMES_KEY = b"names"


class StatsWriter:
    """One kind's open file. Each record reaches the operating system before `append` returns."""

    def __init__(self, run_dir: Path, kind: str, names: tuple[str, ...], resumed_step: int | None = None) -> None:
        """kind: PARAMETERS, ACTIVATIONS, ROUTERS or EXPERTS. names: of the lists' entries, in order.

        resumed_step: what an earlier process wrote after it no longer counts (None: a fresh start, so all of it).
        """
        self._folder, self._kind, self._names = run_dir / FOLDER, kind, names
        self._folder.mkdir(parents=True, exist_ok=True)
        self._written, self._file, self._schema = 0, None, None
        after = resumed_step or 0
        for first_step, path in _files(run_dir, kind):
            if first_step > after:
                _move_aside(path, after)
        # the first file begins where the run resumed, though it may hold later steps only: what an earlier process wrote in
        # between is then not taken for this one's
        self._begins: int | None = after + 1

    def append(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        """Write one record. values: statistic -> [names], the same statistics each time. Raises OSError where the disk refuses.

        After a refusal the next record begins a new file, so that half a record is never in the middle of one.
        """
        columns = [_arrow(np.array([step], dtype=np.int64))]
        columns += [
            pa.FixedSizeListArray.from_arrays(_arrow(np.ascontiguousarray(value, dtype=np.float32)), len(self._names))
            for value in values.values()
        ]
        if self._file is None or self._written == FILE_STEPS:
            self._begin(step, list(values))
        batch = pa.record_batch(columns, schema=self._schema)
        try:
            data = memoryview(batch.serialize())
            while data:  # an unbuffered write may take a part
                data = data[self._file.write(data) :]
        except OSError:
            self.close()
            raise
        self._written += 1

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin(self, step: int, stats: list[str]) -> None:
        self.close()
        first_step, self._begins = self._begins or step, None
        lists = pa.list_(pa.float32(), len(self._names))
        fields = [pa.field("step", pa.int64()), *(pa.field(stat, lists) for stat in stats)]
        self._schema = pa.schema(fields, {_NAMES_KEY: json.dumps(self._names).encode()})
        path = self._folder / f"{self._kind}_{first_step:08d}.arrow"
        self._file, self._written = path.open("wb", buffering=0), 0
        self._file.write(memoryview(self._schema.serialize()))


def _arrow(values: np.ndarray) -> pa.Array:
    """Return an array's memory as Arrow's. `pa.array` would import pandas, a second at the first step of each start."""
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), values.size, [None, pa.py_buffer(values)])


@dataclass(frozen=True)
class Stats:
    """What the monitor recorded: arrays [steps, parameters] and, more rarely, [steps, layers]. NaN where it was not available."""

    steps: np.ndarray  # int64 [n]
    names: tuple[str, ...]  # Hugging Face parameter names [p]
    values: dict[str, np.ndarray]  # statistic -> float32 [n, p]
    activation_steps: np.ndarray  # int64 [m]
    layers: tuple[int, ...]  # layer indices [l]
    activations: dict[str, np.ndarray]  # statistic -> float32 [m, l]


def read_stats(run_dir: Path, first_step: int, last_step: int) -> Stats:
    """Return the records of steps first_step to last_step, both included; empty arrays where there are none.

    Raises FileNotFoundError for a run without statistics. A record that a kill truncated is left out.
    """
    if not (run_dir / FOLDER).is_dir():
        raise FileNotFoundError(f"{run_dir} has no {FOLDER}/: the run's monitor was off (Recipe.monitor)")
    steps, names, values = _read(run_dir, PARAMETERS, first_step, last_step)
    activation_steps, layers, activations = _read(run_dir, ACTIVATIONS, first_step, last_step)
    return Stats(steps, names, values, activation_steps, tuple(int(layer) for layer in layers), activations)


@dataclass(frozen=True)
class RouterRecords:
    """What the monitor recorded of routers, arrays [steps, routers], and, more rarely, of experts: [steps, routers x experts]."""

    steps: np.ndarray  # int64 [n]
    routers: tuple[str, ...]  # their modules' names [r]
    values: dict[str, np.ndarray]  # statistic -> float32 [n, r]
    load_steps: np.ndarray  # int64 [m]
    experts: tuple[str, ...]  # a router's name and an expert's number [r x e]
    loads: np.ndarray  # float32 [m, r x e]


def read_routers(run_dir: Path, first_step: int, last_step: int) -> RouterRecords:
    """Return the records of steps first_step to last_step, both included; empty arrays where there are none."""
    steps, routers, values = _read(run_dir, ROUTERS, first_step, last_step)
    load_steps, experts, loads = _read(run_dir, EXPERTS, first_step, last_step)
    return RouterRecords(steps, routers, values, load_steps, experts, loads.get("load", np.zeros((0, len(experts)), np.float32)))


def _read(run_dir: Path, kind: str, first: int, last: int) -> tuple[np.ndarray, tuple[str, ...], dict[str, np.ndarray]]:
    files = _files(run_dir, kind)
    steps: list[np.ndarray] = []
    columns: dict[str, list[np.ndarray]] = {}
    names: tuple[str, ...] = ()
    for index, (begins, path) in enumerate(files):
        ends = files[index + 1][0] - 1 if index + 1 < len(files) else last
        if begins > last or ends < first:
            continue
        table, file_names = _read_file(path)
        if table is None:
            continue
        file_steps = np.from_dlpack(table.column("step").combine_chunks())
        wanted = (file_steps >= first) & (file_steps <= min(last, ends))
        names = file_names
        steps.append(file_steps[wanted])
        for stat in table.column_names[1:]:
            flat = np.from_dlpack(table.column(stat).combine_chunks().flatten())  # `to_numpy` would import pandas, a second
            columns.setdefault(stat, []).append(flat.reshape(len(file_steps), len(names))[wanted])
    if not steps:
        return np.zeros(0, np.int64), names, {}
    return np.concatenate(steps), names, {stat: np.concatenate(parts) for stat, parts in columns.items()}


def _read_file(path: Path) -> tuple[pa.Table | None, tuple[str, ...]]:
    """Return every whole record of a file, which may still be growing."""
    batches = []
    try:
        reader = pa.ipc.open_stream(pa.BufferReader(path.read_bytes()))
        names = tuple(json.loads(reader.schema.metadata[_NAMES_KEY]))
        while True:
            batches.append(reader.read_next_batch())
    except (StopIteration, pa.ArrowInvalid, OSError):  # its end, or where a kill truncated it
        pass
    return (pa.Table.from_batches(batches), names) if batches else (None, ())


def _files(run_dir: Path, kind: str) -> list[tuple[int, Path]]:
    """Return (first step that it may hold, file) in order."""
    found = (run_dir / FOLDER).glob(f"{kind}_????????*.arrow")
    return sorted((int(path.stem.rpartition("_")[2]), path) for path in found)


def _move_aside(path: Path, after: int) -> None:
    """Rename to FILE.after_step_00000120, numbered where an earlier resume left one of that name."""
    target = path.with_name(f"{path.name}.after_step_{max(after, 0):08d}")
    number = 1
    while target.exists():
        number += 1
        target = target.with_name(f"{path.name}.after_step_{max(after, 0):08d}.{number}")
    path.rename(target)
