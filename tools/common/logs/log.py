"""Holds the numbers of one run, as every log reader returns them, and the names that programs give them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from recipes.common.run_dir.metrics import LARGEST_STEP
from tools.common.console import UsageError

COLUMNS = ("loss", "grad_norm", "lr", "loss_scale", "seconds", "load_evenness")

# names of the numbers in lower case, with blanks for underscores and hyphens; the first that a file has is taken
NAMES = {
    "step": (  # a counter of the optimizer's steps before the logger's own ("_step" of W&B, "Step" of its exports)
        "global step",
        "train/global step",
        "trainer/global step",
        "step",
        "iteration",
        "iter",
        "steps",
        "train/step",
        "train/iteration",
        " step",
    ),
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
        "reduced train loss",
        "train loss step",
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
    "seconds": (
        "seconds",
        "step time",
        "step time s",
        "step seconds",
        "iteration time",
        "iteration time/iteration time",
        "train step timing in s",
    ),
    "load_evenness": ("load evenness",),
}


@dataclass(frozen=True)
class Log:
    """One run's numbers in the order written. Where the step goes back, the run restarted from a checkpoint."""

    name: str  # the file, and the run in it if it holds several
    source: str  # what wrote it, for messages
    steps: np.ndarray  # [n] int64; a step logged twice in a row is here once, with the later numbers
    columns: dict[str, np.ndarray]  # those of COLUMNS that the log has: [n]. As `AnomalyDetector.feed` takes them
    resumes: tuple[int, ...] = ()  # steps of checkpoints from which the log says it resumed
    notes: tuple[str, ...] = ()  # what could not be read and was left out, and why: for the user, a line each

    def final(self) -> Log:
        """Return the log without the steps that a restart repeated: steps only rise, and the later line wins."""
        never = np.iinfo(np.int64).max
        least_after = np.minimum.accumulate(np.append(self.steps[1:], never)[::-1])[::-1]
        kept = self.steps < least_after
        return replace(self, steps=self.steps[kept], columns={name: values[kept] for name, values in self.columns.items()})


def plain_name(name: str) -> str:
    """Spell a column's name as NAMES does."""
    return re.sub(r"[_-]+", " ", name.strip().strip('"').lower())


def build_log(
    name: str,
    source: str,
    steps: Sequence[float],
    columns: dict[str, Sequence[float | None]],
    resumes: Sequence[int] = (),
    notes: Sequence[str] = (),
) -> Log:
    """Build a Log from rows. None: the row lacks the number; NaN: it was not finite. Rows without loss or step are left out.

    notes: what the reader left out.
    """
    missing = {key: np.array([value is None for value in values]) for key, values in columns.items()}
    arrays = {key: np.array([np.nan if v is None else v for v in values], dtype=float) for key, values in columns.items()}
    for key in arrays:
        if key != "loss":  # for the detectors infinity is "not finite", NaN "unknown"
            arrays[key][np.isnan(arrays[key]) & ~missing[key]] = np.inf
    return build_arrays(name, source, np.asarray(steps, dtype=float), arrays, ~missing["loss"], resumes, notes)


def build_arrays(
    name: str,
    source: str,
    steps: np.ndarray,
    columns: dict[str, np.ndarray],
    has_loss: np.ndarray,
    resumes: Sequence[int] = (),
    notes: Sequence[str] = (),
) -> Log:
    """Build a Log as build_log does, from arrays in the detectors' convention."""
    kept = (np.abs(steps) <= LARGEST_STEP) & (steps == np.floor(steps)) & has_loss
    notes = [*notes, *_stepless(name, source, steps[has_loss])]
    steps = steps[kept].astype(np.int64)
    last_of_step = np.append(steps[1:] != steps[:-1], True) if len(steps) else np.zeros(0, dtype=bool)
    columns = {key: values[kept][last_of_step] for key, values in columns.items()}
    columns = {key: values for key, values in columns.items() if key == "loss" or not np.isnan(values).all()}
    if not len(steps):
        raise UsageError(f"{name}: {source} without any step that has a loss" + (f" ({'; '.join(notes)})" if notes else ""))
    return Log(name, source, steps[last_of_step], columns, tuple(resumes), tuple(f"{name}: {note}" for note in notes))


def _stepless(name: str, source: str, steps: np.ndarray) -> Iterator[str]:
    """Yield how many rows with a loss are left out for want of a step. Raises UsageError where the column is none of steps."""
    absent, beyond = np.isnan(steps), np.abs(steps) > LARGEST_STEP
    fraction = ~absent & ~beyond & (steps != np.floor(steps))
    if 2 * fraction.sum() > len(steps):
        some = ", ".join(f"{step:g}" for step in steps[fraction][:3])
        raise UsageError(
            f"{name}: the steps of {source} are fractions ({some}): epochs or the like, not steps; "
            "give it a column of whole numbers named step"
        )
    for rows, why in (
        (absent, "they have no step"),
        (beyond, f"their step is beyond {LARGEST_STEP}"),
        (fraction, "their step is a fraction"),
    ):
        if rows.any():
            first = "" if rows is absent else f", the first {steps[rows][0]:g}"
            yield f"{rows.sum()} rows with a loss are left out: {why}{first}"
