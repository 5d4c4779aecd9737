"""The numbers of one run, as the readers of logs hand them on, and the names that programs have for them."""

from __future__ import annotations

import gzip
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from tools.common.console import UsageError

COLUMNS = ("loss", "grad_norm", "lr", "loss_scale", "seconds")

# What programs call the numbers, in lower case, with blanks for underscores and hyphens. The first that a file has is taken.
NAMES = {
    "step": ("step", "iteration", "iter", "global step", "steps", "trainer/global step", " step"),
    "loss": (
        "loss",
        "lm loss",
        "train loss",
        "train/loss",
        "train/ce loss",
        "train/crossentropyloss",
        "train/lm loss",
        "lm loss training/lm loss",
        "loss metrics/global avg loss",
        "training loss",
        "train/train loss",
        "train loss/step",
        "train/samples/train loss",
    ),
    "grad_norm": (
        "grad norm",
        "train/grad norm",
        "optim/total grad norm",
        "grad norm/grad norm",
        "gradient norm",
        "global grad norm",
        "gnorm",
        "norm",
    ),
    "lr": (
        "lr",
        "learning rate",
        "train/learning rate",
        "train/lr",
        "optim/lr",
        "optim/lr (group 0)",
        "learning rate/learning rate",
    ),
    "loss_scale": ("loss scale", "loss scale/loss scale", "train/loss scale", "train/samples/loss scale"),
    "seconds": ("seconds", "step time", "step time s", "step seconds", "iteration time", "iteration time/iteration time"),
}


@dataclass(frozen=True)
class Log:
    """One run's numbers in the order written. A step that goes back is a restart from a checkpoint."""

    name: str  # the file, and the run in it where there are several
    source: str  # what wrote it, in words
    steps: np.ndarray  # [n] int64; a step logged twice in a row is here once, with the later numbers
    columns: dict[str, np.ndarray]  # of COLUMNS, those that the log has: [n]. As `AnomalyDetector.feed` takes them
    resumes: tuple[int, ...] = ()  # steps of checkpoints that the log says it went on from

    def final(self) -> Log:
        """Without what a restart threw away: steps only go up, and the later line wins."""
        never = np.iinfo(np.int64).max
        least_after = np.minimum.accumulate(np.append(self.steps[1:], never)[::-1])[::-1]
        kept = self.steps < least_after
        return Log(self.name, self.source, self.steps[kept], {n: c[kept] for n, c in self.columns.items()}, self.resumes)


def open_text(path: Path) -> TextIO:
    """A text file, packed with gzip or not. Bytes that are no UTF-8 do not stop the reading of a log."""
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(path), encoding="utf-8", errors="replace")
    return path.open(encoding="utf-8", errors="replace", newline="")


def plain_name(name: str) -> str:
    """A column's name as NAMES spells it."""
    return re.sub(r"[_-]+", " ", name.strip().strip('"').lower())


def build_log(
    name: str, source: str, steps: Sequence[float], columns: dict[str, Sequence[float | None]], resumes: Sequence[int] = ()
) -> Log:
    """A Log of rows. None: the row lacks the number; NaN: it was not finite. Rows without a loss or a step are left out."""
    missing = {key: np.array([value is None for value in values]) for key, values in columns.items()}
    arrays = {key: np.array([np.nan if v is None else v for v in values], dtype=float) for key, values in columns.items()}
    for key in arrays:
        if key != "loss":  # the detectors' way to say "not finite", where NaN says "unknown"
            arrays[key][np.isnan(arrays[key]) & ~missing[key]] = np.inf
    return build_arrays(name, source, np.asarray(steps, dtype=float), arrays, ~missing["loss"], resumes)


def build_arrays(
    name: str,
    source: str,
    steps: np.ndarray,
    columns: dict[str, np.ndarray],
    has_loss: np.ndarray,
    resumes: Sequence[int] = (),
) -> Log:
    """As build_log, of arrays in the detectors' way."""
    kept = np.isfinite(steps) & has_loss
    steps = steps[kept].astype(np.int64)
    last_of_step = np.append(steps[1:] != steps[:-1], True) if len(steps) else np.zeros(0, dtype=bool)
    columns = {key: values[kept][last_of_step] for key, values in columns.items()}
    columns = {key: values for key, values in columns.items() if key == "loss" or not np.isnan(values).all()}
    if not len(steps):
        raise UsageError(f"{name}: {source} without a single step that has a loss")
    return Log(name, source, steps[last_of_step], columns, tuple(resumes))
