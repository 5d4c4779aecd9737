"""Per-tensor statistics of a run, in columns on disk: `tensor_stats/`, written by rank 0, read by tools.

Arrow IPC streams (arrow.apache.org/docs/format/Columnar.html), each a schema and then one record batch a step: an int64 `step`
and, for each statistic, a list of float32, one for each parameter (or layer). Only whole batches are read, so `kill -9` loses
the step that was being written, at most. A piece is named after the first step that it may hold:

    parameters_00000001.arrow    every step that the monitor looks at: grad_norm, weight_norm, ... by parameter
    activations_00000001.arrow   rarer: activation_rms, max_attention_logit, router_load_max by layer

Where a run was resumed from an earlier step, the new piece's name says from which step on older pieces no longer count; pieces
that begin later are renamed. Nothing is deleted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

FOLDER = "tensor_stats"
PARAMETERS, ACTIVATIONS = "parameters", "activations"
PIECE_STEPS = 1000  # records in a piece: a reader opens few files, and none that it does not need
_NAMES_KEY = b"names"


class StatsWriter:
    """One kind's open piece. `append` once a record; each reaches the operating system before it returns."""

    def __init__(self, run_dir: Path, kind: str, names: tuple[str, ...], resumed_step: int | None = None) -> None:
        """kind: PARAMETERS or ACTIVATIONS. names: what the columns' lists are over, in order.

        resumed_step: what an earlier process wrote after it no longer counts (None: a fresh start, so all of it).
        """
        self._folder, self._kind, self._names = run_dir / FOLDER, kind, names
        self._folder.mkdir(parents=True, exist_ok=True)
        self._written, self._file, self._schema = 0, None, None
        after = resumed_step or 0
        for first_step, piece in _pieces(run_dir, kind):
            if first_step > after:
                _move_aside(piece, after)
        # the first piece begins where the start went back to, though it may hold later steps only: what an earlier process
        # wrote in between is then not taken for this one's
        self._begins: int | None = after + 1

    def append(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        """values: statistic -> [names], the same statistics each time. Raises OSError where the disk refuses.

        After a refusal the next record begins a new piece, so that half a record is never in the middle of one.
        """
        columns = [pa.array([step], pa.int64())]
        for value in values.values():
            flat = pa.array(np.ascontiguousarray(value, dtype=np.float32))
            columns.append(pa.FixedSizeListArray.from_arrays(flat, len(self._names)))
        if self._file is None or self._written == PIECE_STEPS:
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


@dataclass(frozen=True)
class Stats:
    """What the monitor saw: arrays [steps, parameters] and, more rarely, [steps, layers]. NaN where it could not be had."""

    steps: np.ndarray  # int64 [n]
    names: tuple[str, ...]  # Hugging Face parameter names [p]
    values: dict[str, np.ndarray]  # statistic -> float32 [n, p]
    activation_steps: np.ndarray  # int64 [m]
    layers: tuple[int, ...]  # layer indices [l]
    activations: dict[str, np.ndarray]  # statistic -> float32 [m, l]


def read_stats(run_dir: Path, first_step: int, last_step: int) -> Stats:
    """The records of steps first_step to last_step, both included; empty arrays where there are none.

    Raises FileNotFoundError for a run without statistics. A record that a kill cut short is left out.
    """
    if not (run_dir / FOLDER).is_dir():
        raise FileNotFoundError(f"{run_dir} has no {FOLDER}/: the run's monitor was off (Recipe.monitor)")
    steps, names, values = _read(run_dir, PARAMETERS, first_step, last_step)
    activation_steps, layers, activations = _read(run_dir, ACTIVATIONS, first_step, last_step)
    return Stats(steps, names, values, activation_steps, tuple(int(layer) for layer in layers), activations)


def _read(run_dir: Path, kind: str, first: int, last: int) -> tuple[np.ndarray, tuple[str, ...], dict[str, np.ndarray]]:
    pieces = _pieces(run_dir, kind)
    steps: list[np.ndarray] = []
    columns: dict[str, list[np.ndarray]] = {}
    names: tuple[str, ...] = ()
    for index, (begins, path) in enumerate(pieces):
        ends = pieces[index + 1][0] - 1 if index + 1 < len(pieces) else last
        if begins > last or ends < first:
            continue
        table, piece_names = _read_piece(path)
        if table is None:
            continue
        here = table.column("step").to_numpy()
        wanted = (here >= first) & (here <= min(last, ends))
        names = piece_names
        steps.append(here[wanted])
        for stat in table.column_names[1:]:
            flat = table.column(stat).combine_chunks().flatten().to_numpy(zero_copy_only=False)
            columns.setdefault(stat, []).append(flat.reshape(len(here), len(names))[wanted])
    if not steps:
        return np.zeros(0, np.int64), names, {}
    return np.concatenate(steps), names, {stat: np.concatenate(parts) for stat, parts in columns.items()}


def _read_piece(path: Path) -> tuple[pa.Table | None, tuple[str, ...]]:
    """Every whole record of a piece, which may still be growing."""
    batches = []
    try:
        reader = pa.ipc.open_stream(pa.BufferReader(path.read_bytes()))
        names = tuple(json.loads(reader.schema.metadata[_NAMES_KEY]))
        while True:
            batches.append(reader.read_next_batch())
    except (StopIteration, pa.ArrowInvalid, OSError):  # its end, or where a kill cut it
        pass
    return (pa.Table.from_batches(batches), names) if batches else (None, ())


def _pieces(run_dir: Path, kind: str) -> list[tuple[int, Path]]:
    """(first step that it may hold, file) in order."""
    found = (run_dir / FOLDER).glob(f"{kind}_????????*.arrow")
    return sorted((int(path.stem.rpartition("_")[2]), path) for path in found)


def _move_aside(piece: Path, after: int) -> None:
    """piece.after_step_00000120, numbered where an earlier resume left one of that name."""
    target = piece.with_name(f"{piece.name}.after_step_{max(after, 0):08d}")
    number = 1
    while target.exists():
        number += 1
        target = target.with_name(f"{piece.name}.after_step_{max(after, 0):08d}.{number}")
    piece.rename(target)
