"""Shows a run's progress on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from typing import TextIO

from recipes.common.run_dir.metrics import Value

PLAIN_LINE_SECONDS = 10.0  # between progress lines when stderr is no terminal


class StepProgress:
    """A tqdm bar where `stream` is a terminal, plain lines where it is not (logs, pipes)."""

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
        text = describe_step(record)
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
        return True  # a terminal that does not report its size


def describe_step(record: Mapping[str, Value]) -> str:
    """Return the numbers of a step that people follow, as "loss 3.2114 | 12.3k tok/s | lr 3.00e-04 | grad norm 1.21"."""
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


def _short(number: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
