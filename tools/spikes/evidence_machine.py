"""Evidence in the machine: copies of weights that differ between ranks, and steps that take longer."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from tools.spikes.case import Case
from tools.spikes.causes import NORM_DRIFT, SLOW_RANK
from tools.spikes.findings import Evidence, Finding, Unanswered

SLOWER = 1.3  # times the usual step


def step_time(case: Case) -> Iterator[Evidence]:
    """Steps that take longer for good, at the same batch and without waiting for data."""
    seconds = case.columns.get("seconds")
    if seconds is None:
        yield Unanswered(SLOW_RANK, "whether steps took longer", "log seconds of each step")
        return
    before = (case.steps < case.onset - 1) & (case.steps >= case.onset - 40)
    after = (case.steps >= case.onset) & (case.steps <= max(case.onset, case.step) + 12)
    per_token = seconds / case.columns["tokens"]
    if before.sum() < 6 or after.sum() < 3:
        yield Unanswered(SLOW_RANK, "whether steps took longer", "the steps after the event")
        return
    usual, now = float(np.median(per_token[before])), float(np.median(per_token[after]))
    ratio = now / usual
    noise = 1.4826 * float(np.median(np.abs(per_token[before] - usual))) / usual
    text = f"steps took {ratio:.2f} times as long as before (usual scatter {noise:.0%})"
    if ratio < max(SLOWER, 1 + 3 * noise / math.sqrt(after.sum())):
        yield Finding(SLOW_RANK, -5.0, text)
        return
    waits = case.columns.get("data_wait_share")
    if waits is not None and float(np.median(waits[after])) > 0.5 * (1 - 1 / ratio):
        yield Finding(SLOW_RANK, -2.0, f"{text}, but waiting for data is most of it: look at the data, not at a rank")
        return
    still = not case.moved
    yield Finding(SLOW_RANK, 5.0 if still else 0.5, text + ("; loss and gradients are as they were" if still else ""))
    yield Unanswered(SLOW_RANK, "which rank it is", "per-rank step times: python -m tools.preflight on the machines")


def replicas(case: Case) -> Iterator[Evidence]:
    """What the drift check of the monitor found: copies that should be equal to the last bit and are not."""
    if case.layout["tensor"] == case.layout["pipeline"] == case.layout["data"] == 1:
        yield Finding(NORM_DRIFT, -9.0, "there is one rank, and no copies")
        return
    yield Unanswered(NORM_DRIFT, "whether copies were equal", "turn the drift check on (Recipe.monitor)")
