"""What a run says about itself, step by step: `metrics.jsonl`, the progress bar, W&B and TensorBoard. Rank 0 only.

`metrics.jsonl` is the record; the others show the same numbers. One JSON object a line, one line a step, in order:

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

    event             the kinds of what the detectors saw at this step (recipes.common.anomalies.detector)
    rewinds, rewound_from_step, lr_factor     once the run went back: how often, from where, and on the learning rate

Further fields are welcome: any name, a number or a string. Floats are written so that they read back equal. NaN and
infinities, which JSON does not have, are the strings "NaN", "Infinity" and "-Infinity" (`read_metrics` turns them back).
Each line reaches the operating system before the next step starts, so `kill -9` loses one line at most.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

METRICS = "metrics.jsonl"
PLAIN_LINE_SECONDS = 10.0  # between progress lines when stderr is no terminal
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

Value = float | int | str | None
Note = Callable[[str], None]


class RunLog:
    """The open sinks of one run. `write` once a step, `note` for a line in between, `close` at the end.

    Missing or failing W&B and TensorBoard cost one line on stderr, never the run.
    """

    def __init__(
        self,
        out_dir: Path,
        *,
        name: str,
        run_steps: int,
        resumed_step: int | None = None,
        config: Mapping[str, Any] | None = None,
        run_id: str | None = None,
        wandb: bool = True,
        tensorboard: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        """Moves aside what an earlier process wrote after `resumed_step` (None: a fresh start, so all of it).

        config: shown by W&B. run_id: equal over resumes (the manifest's).
        """
        out_dir.mkdir(parents=True, exist_ok=True)
        moved = rewind_metrics(out_dir, -1 if resumed_step is None else resumed_step)
        first_step = resumed_step or 0
        self._out_dir = out_dir
        self._file = (out_dir / METRICS).open("ab", buffering=0)
        self._waiting, self._refused = b"", False
        self._progress = Progress(run_steps, first_step, stream or sys.stderr)
        self._wandb = _start_wandb(out_dir, name, config or {}, run_id, self.note) if wandb else None
        if moved is not None:
            self.note(f"{METRICS}: later steps of an earlier process are now in {moved.name}")
        self._tensorboard = _start_tensorboard(out_dir, first_step, self.note) if tensorboard else None

    def write(self, record: Mapping[str, Value]) -> None:
        """Append one step to every sink. `record` needs "step"."""
        self._append(encode(record))
        if self._wandb is not None:
            try:
                self._wandb.log(dict(record))
            except Exception as error:  # a sink that shows numbers must not end the run
                self._wandb = None
                self.note(f"W&B is off from step {record['step']}: {_one_line(error)}")
        if self._tensorboard is not None:
            try:
                for key, value in record.items():
                    if key != "step" and isinstance(value, int | float):
                        self._tensorboard.add_scalar(key, value, record["step"])
            except Exception as error:  # as above: a full disk, a folder taken away
                self._tensorboard = None
                self.note(f"TensorBoard is off from step {record['step']}: {_one_line(error)}")
        self._progress.show(record)

    def _append(self, line: bytes) -> None:
        """To metrics.jsonl. While the disk is full (a save may fill it for a moment) lines wait in memory, for the next write."""
        self._waiting += line
        try:
            self._waiting = self._waiting[self._file.write(self._waiting) :]  # an unbuffered write may take a part
            self._refused = False
        except OSError as error:
            if not self._refused:
                self.note(f"{METRICS} cannot be written ({_one_line(error)}): its lines wait in memory")
            self._refused = True

    def rewind(self, step: int) -> None:
        """The run went back to `step`: what was written after it moves aside, as at a resume."""
        self._append(b"")
        self._file.close()
        moved = rewind_metrics(self._out_dir, step)
        self._file = (self._out_dir / METRICS).open("ab", buffering=0)
        self._progress.rewind(step)
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = _start_tensorboard(self._out_dir, step, self.note)
        if moved is not None:
            self.note(f"{METRICS}: the steps that were undone are now in {moved.name}")

    def note(self, text: str) -> None:
        """A line for people on stderr (a checkpoint, an evaluation), without breaking the bar."""
        self._progress.note(text)

    def close(self) -> None:
        self._append(b"")
        self._progress.close()
        if self._wandb is not None:
            try:
                self._wandb.finish()
            except Exception as error:  # as in write
                self.note(f"W&B did not finish: {_one_line(error)}")
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._file.close()


def encode(record: Mapping[str, Value]) -> bytes:
    """One line of metrics.jsonl, newline included."""
    assert type(record["step"]) is int, record
    return json.dumps({key: plain(value) for key, value in record.items()}, allow_nan=False).encode() + b"\n"


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl, or of the one in a run directory, with NaN and infinities as floats again.

    A last line without a newline was cut by a kill, or is being written: it is left out. Any other bad line raises
    ValueError with its number.
    """
    path = path / METRICS if path.is_dir() else path
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
                record["step"] += 0
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}, line {number} is not a record of a step: {_one_line(error)}") from None
            yield {key: NON_FINITE.get(value, value) if isinstance(value, str) else value for key, value in record.items()}


def rewind_metrics(out_dir: Path, step: int) -> Path | None:
    """Before resuming after `step`: move lines of later steps, and a line cut by a kill, to a file beside.

    Returns that file, metrics.after_step_00000120.jsonl, or None where there was nothing to move. Nothing is lost: a
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


class Progress:
    """A tqdm bar where `stream` is a terminal, a plain line now and then where it is not (logs, pipes)."""

    def __init__(self, run_steps: int, first_step: int, stream: TextIO) -> None:
        self._run_steps = run_steps
        self._stream = stream
        self._last_line = -math.inf  # time.monotonic() of the last plain line
        self._unseen = ""  # the newest step's line, where it was too early to print it
        self._bar = None
        if stream.isatty() and _has_size(stream):  # tqdm shows nothing on a pseudo-terminal of no size
            from tqdm import tqdm

            self._bar = tqdm(total=run_steps, initial=first_step, file=stream, unit="step", dynamic_ncols=True)

    def show(self, record: Mapping[str, Value]) -> None:
        text = describe(record)
        step = int(record["step"])
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        self._unseen = f"step {step}/{self._run_steps} | {text}"
        if now - self._last_line >= PLAIN_LINE_SECONDS or step == self._run_steps or "val_loss" in record:
            self._last_line = now
            self._print_unseen()

    def rewind(self, step: int) -> None:
        if self._bar is not None:
            self._bar.n = step
            self._bar.refresh()

    def note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._print_unseen()  # the last step, wherever the run stopped

    def _print_unseen(self) -> None:
        if self._unseen:
            print(self._unseen, file=self._stream, flush=True)
        self._unseen = ""


def _has_size(stream: TextIO) -> bool:
    try:
        return min(os.get_terminal_size(stream.fileno())) > 0
    except (OSError, ValueError):
        return True  # it calls itself a terminal and does not say how large it is


def describe(record: Mapping[str, Value]) -> str:
    """The numbers of a step that people watch, as "loss 3.2114 | 12.3k tok/s | lr 3.00e-04 | grad norm 1.21"."""
    formats = {
        "loss": lambda value: f"loss {value:.4f}",
        "val_loss": lambda value: f"val loss {value:.4f}",
        "tokens_per_second": lambda value: f"{_short(value)} tok/s",
        "lr": lambda value: f"lr {value:.2e}",
        "grad_norm": lambda value: f"grad norm {value:.3g}",
        "loss_scale": lambda value: f"scale {value:g}",
        "skipped_steps": lambda value: f"skipped {value}" if value else "",
    }
    parts = [formats[key](record[key]) for key in formats if record.get(key) is not None]
    return " | ".join(part for part in parts if part)


def _start_wandb(out_dir: Path, name: str, config: Mapping[str, Any], run_id: str | None, note: Note) -> Any:
    """A W&B run: online where the user is logged in, else offline. WANDB_MODE and the like are W&B's own and hold."""
    try:
        import wandb

        mode = wandb.setup().settings.mode
        if mode == "online" and not _wandb_login(wandb, note):
            mode = "offline"
        run = wandb.init(
            project="trifold",
            name=name,
            id=run_id,
            resume="allow" if run_id and mode == "online" else None,  # offline runs are joined by their id when synced
            dir=out_dir,
            mode=mode,
            config=dict(config),
            # console: W&B would otherwise redirect stderr, which the progress bar needs as a terminal
            settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True),
        )
        run.define_metric("*", step_metric="step")
    except Exception as error:  # missing, broken, refused by its server: the numbers are in metrics.jsonl anyway
        note(f"W&B is off: {_one_line(error)}")
        return None
    return run


def _wandb_login(wandb: Any, note: Note) -> bool:
    """Whether the user has credentials that work; without any, nothing is asked and no network is used."""
    try:
        return bool(wandb.login(prompt=False))
    except Exception as error:
        note(f"W&B is offline: {_one_line(error)}")
        return False


def _start_tensorboard(out_dir: Path, first_step: int, note: Note) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step: hides what an earlier process wrote after the checkpoint that is resumed
        return SummaryWriter(out_dir / "tensorboard", purge_step=first_step + 1 if first_step else None, flush_secs=30)
    except Exception as error:  # missing or broken
        note(f"TensorBoard is off: {_one_line(error)}")
        return None


def plain(value: Value) -> Value:
    """As JSON has it: NaN and infinities by name."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _step_of(line: bytes) -> float:
    """The step of a line; a line that was cut counts as later than all."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


def _short(number: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
