"""Writes and reads `metrics.jsonl`, the record of a run step by step: one JSON object a line, in order. Rank 0 writes it.

    step              counts from 1 (0: the evaluation before the first step)
    loss              mean over the tokens of the step, in nats
    lr, grad_norm     used by the step; the norm is global and before clipping
    loss_scale        fp16 only
    skipped_steps     steps skipped so far: fp16 gradients that overflowed, or a NaN or an infinity
    skip_reason       on a step skipped for a NaN or an infinity: which tensor was the first to have one
    drift             where a drift check found copies of a parameter that differ: which, across which ranks
    loss_max, loss_max_rank           the worst data rank's own loss, and which it is
    log_z, max_logit                  mean log of the softmax's normaliser; largest logit
    weight_norm, update_norm, update_ratio    of the fp32 weights, of what the step added to them, and their ratio
    activation_rms/max, max_attention_logit/max, router_load_max/max    on some steps, the largest of all layers
    tokens            of this step
    consumed_tokens, consumed_seqs    up to and including this step
    seconds, tokens_per_second        of this step, whole job
    val_loss          on steps that evaluate; with a blend the mean, and val_loss/FOLDER for each
    data_wait_share   of the step, waiting for its batch
    save_seconds, save_stall_seconds  on the step after a save has ended: total, and blocking

    event             the kinds of the events that the detectors reported at this step (recipes.common.anomalies.events)
    rewinds, rewound_from_step, lr_factor     from the first rewind on: how many, from where, the factor on the learning rate

Further fields may have any name, and a number or a string. Floats are written so that they read back equal. NaN and
infinities, which JSON does not have, are the strings "NaN", "Infinity" and "-Infinity" (`read_metrics` turns them back).
Each line reaches the operating system before the next step starts, so `kill -9` loses one line at most.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from recipes.common.config.json_files import parse_json

METRICS = "metrics.jsonl"
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

Value = float | int | str | None
Note = Callable[[str], None]  # prints a line for people


class MetricsWriter:
    """The open file. While the disk is full (a save may fill it for a moment), lines wait in memory for the next write."""

    def __init__(self, out_dir: Path, resumed_step: int | None, note: Note) -> None:
        """Move aside what an earlier process wrote after `resumed_step` (None: a fresh start, so all of it)."""
        out_dir.mkdir(parents=True, exist_ok=True)
        self._out_dir, self._note = out_dir, note
        self._waiting, self._refused = b"", False
        self._open_after(-1 if resumed_step is None else resumed_step, "later steps of an earlier process")

    def append(self, record: Mapping[str, Value]) -> None:
        """Write one step. `record` needs "step"."""
        self._write(encode(record))

    def rewind(self, step: int) -> None:
        """Move aside what was written after `step`, as a resume does."""
        self.close()
        self._open_after(step, "the steps that were undone")

    def close(self) -> None:
        self._write(b"")
        self._file.close()

    def _open_after(self, step: int, what: str) -> None:
        moved = rewind_metrics(self._out_dir, step)
        self._file = (self._out_dir / METRICS).open("ab", buffering=0)
        if moved is not None:
            self._note(f"{METRICS}: {what} are now in {moved.name}")

    def _write(self, line: bytes) -> None:
        self._waiting += line
        try:
            self._waiting = self._waiting[self._file.write(self._waiting) :]  # an unbuffered write may take a part
            self._refused = False
        except OSError as error:
            if not self._refused:
                self._note(f"writing {METRICS} failed ({one_line(error)}): its lines wait in memory")
            self._refused = True


def encode(record: Mapping[str, Value]) -> bytes:
    """Return one line of metrics.jsonl, newline included."""
    assert type(record["step"]) is int, record
    return json.dumps({key: plain(value) for key, value in record.items()}, allow_nan=False).encode() + b"\n"


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a metrics.jsonl, or of the one in a run directory, with NaN and infinities as floats again.

    A last line without a newline was truncated by a kill, or is being written: it is left out. Any other bad line raises
    ValueError with its number.
    """
    path = path / METRICS if path.is_dir() else path
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = parse_json(line, f"line {number}")
                record["step"] += 0
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}, line {number} is not a record of a step: {one_line(error)}") from None
            yield {key: NON_FINITE.get(value, value) if isinstance(value, str) else value for key, value in record.items()}


def rewind_metrics(out_dir: Path, step: int) -> Path | None:
    """Move lines of steps after `step`, and a line truncated by a kill, to a file beside.

    Return that file, metrics.after_step_00000120.jsonl, or None where there was nothing to move. Nothing is lost: a
    second resume from the same step appends to it. A crash in here leaves the lines in both files, never in none.
    `step` -1 moves everything: for a fresh start in a used directory.
    """
    path = out_dir / METRICS
    if not path.exists():
        return None
    kept, moved = path.with_suffix(".jsonl.new"), out_dir / f"metrics.after_step_{max(step, 0):08d}.jsonl"
    any_moved = False
    with path.open("rb") as old, kept.open("wb") as new, moved.open("ab") as aside:
        for line in old:
            if _step_of(line) > step:
                aside.write(line if line.endswith(b"\n") else line + b"\n")
                any_moved = True
            else:
                new.write(line)
        for file in (aside, new):
            file.flush()
            os.fsync(file.fileno())
    if any_moved:
        os.replace(kept, path)
        return moved
    kept.unlink()
    if moved.stat().st_size == 0:
        moved.unlink()
    return None


def plain(value: Value) -> Value:
    """Return the value as JSON can hold it: NaN and infinities by name."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _step_of(line: bytes) -> float:
    """Return the step of a line; a truncated line counts as later than all."""
    try:
        return parse_json(line, "line")["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
