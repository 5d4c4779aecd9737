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
    router_loss       of a mixture: the loss that balances its experts, before its coefficient; it is not in `loss`
    router_log_z_squared              the routers' mean of (log Z)^2, summed over the layers, where the recipe has a router z-loss
    weight_norm, update_norm, update_ratio    of the fp32 weights, of what the step added to them, and their ratio
    activation_rms/max, max_attention_logit/max    on some steps, the largest of all layers
    router_load_max/max               of a mixture: the busiest expert's tokens over the mean of its layer, in the worst layer
    load_evenness, router_entropy     the lowest of all routers, 0 to 1 (recipes.common.monitor.router_stats)
    dead_experts                      in all layers, experts without a token in the whole step
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

import contextlib
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from recipes.common.config.json_files import JsonError, open_lines, parse_json

METRICS = "metrics.jsonl"
LARGEST_STEP = 2**50  # beyond it is no count of steps
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
        with contextlib.suppress(OSError):  # NFS tells here that the disk is full
            self._file.close()

    def _open_after(self, step: int, what: str) -> None:
        moved, damaged = rewind_metrics(self._out_dir, step)
        self._file = open_lines(self._out_dir / METRICS)
        if moved is not None:
            self._note(f"{METRICS}: {what} are now in {moved.name}")
        if damaged is not None:
            self._note(f"{METRICS}: damaged lines are now in {damaged.name}")

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


def read_metrics(path: Path, *, skip_damaged: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the records of a metrics.jsonl, or of the one in a run directory, with NaN and infinities as floats again.

    A last line without a newline was truncated by a kill, or is being written: it is left out. Any other bad line raises
    JsonError with its number, or is left out too.
    """
    path = path / METRICS if path.is_dir() else path
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = parse_record(line)
            except ValueError as error:
                if skip_damaged:
                    continue
                raise JsonError(f"{path}, line {number} is not a record of a step: {error}; delete the line") from None
            yield {key: NON_FINITE.get(value, value) if isinstance(value, str) else value for key, value in record.items()}


def parse_record(line: bytes) -> dict[str, Any]:
    """Return the record of a line of metrics.jsonl. Raises ValueError for one that is none."""
    record = parse_json(line, "the line")
    if type(record.get("step")) is not int:
        raise ValueError("it has no step")
    if abs(record["step"]) > LARGEST_STEP:
        raise ValueError(f"its step {str(record['step'])[:30]} is beyond {LARGEST_STEP}")
    return record


def rewind_metrics(out_dir: Path, step: int) -> tuple[Path | None, Path | None]:
    """Move lines of steps after `step`, and a line truncated by a kill, to a file beside; damaged lines to another.

    Return the files, metrics.after_step_00000120.jsonl and metrics.damaged.jsonl, or None where there was nothing to move.
    Nothing is lost: a second resume from the same step appends to them. A crash in here leaves the lines in two files, never in
    none. `step` -1 moves everything: for a fresh start in a used directory.
    """
    path = out_dir / METRICS
    if not path.exists():
        return None, None
    kept = path.with_suffix(".jsonl.new")
    later, damaged = out_dir / f"metrics.after_step_{max(step, 0):08d}.jsonl", out_dir / "metrics.damaged.jsonl"
    moved: dict[Path, BinaryIO] = {}
    with path.open("rb") as old, kept.open("wb") as new, contextlib.ExitStack() as opened:
        for line in old:
            found = _step_of(line)
            if found is not None and found <= step:
                new.write(line)
                continue
            aside = damaged if found is None else later
            if aside not in moved:
                moved[aside] = opened.enter_context(io.BufferedWriter(open_lines(aside)))
            moved[aside].write(line if line.endswith(b"\n") else line + b"\n")
        for file in (*moved.values(), new):
            file.flush()
            os.fsync(file.fileno())
    if not moved:
        kept.unlink()
        return None, None
    os.replace(kept, path)
    return later if later in moved else None, damaged if damaged in moved else None


def plain(value: Value) -> Value:
    """Return the value as JSON can hold it: NaN and infinities by name."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _step_of(line: bytes) -> float | None:
    """Return the step of a line; a truncated line, the last, counts as later than all. None for a damaged one."""
    if not line.endswith(b"\n"):
        return math.inf
    try:
        return parse_record(line)["step"]
    except ValueError:
        return None


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
