"""Finds evidence in the machine: copies of weights that differ between ranks, numbers not finite, steps that take longer."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from recipes.common.monitor.parameter_groups import group_of
from recipes.common.run_dir.black_box import read_boxes
from tools.spikes.evidence.case import Case
from tools.spikes.evidence.causes import BAD_DOCUMENT, BIT_FLIP, NORM_DRIFT, SLOW_RANK
from tools.spikes.evidence.findings import Evidence, Finding, Unanswered

SLOWER = 1.3  # times the usual step
FAST = 0.2  # quantile of the step times of a stretch


def step_time(case: Case) -> Iterator[Evidence]:
    """Find steps that take longer for good, with the same batch and without waiting for data."""
    seconds = case.columns.get("seconds")
    if seconds is None:
        yield Unanswered(SLOW_RANK, "whether steps took longer", "log the seconds of each step")
        return
    before = (case.steps < case.onset - 1) & (case.steps >= case.onset - 18)
    after = (case.steps >= case.onset) & (case.steps <= max(case.onset, case.step) + 12)
    per_token = seconds / case.columns["tokens"]
    if before.sum() < 6 or after.sum() < 3:
        yield Unanswered(SLOW_RANK, "whether steps took longer", "the steps after the event")
        return
    ratio = float(np.median(per_token[after]) / np.median(per_token[before]))
    # a busy machine adds time now and then; a rank that is slow for good slows the fastest steps too
    fast = float(np.quantile(per_token[after], FAST) / np.quantile(per_token[before], FAST))
    noise = float(np.median(per_token[before]) / np.quantile(per_token[before], FAST)) - 1
    text = f"steps took {ratio:.2f} times as long as before, the faster ones {fast:.2f} times (usual scatter {noise:.0%})"
    if ratio < SLOWER or fast < 1 + (SLOWER - 1) / 2:
        yield Finding(SLOW_RANK, -5.0, text)
        return
    waits = case.columns.get("data_wait_share")
    if waits is not None and float(np.median(waits[after])) > 0.5 * (1 - 1 / ratio):
        yield Finding(SLOW_RANK, -2.0, f"{text}, but mostly waiting for data: look at the data, not at a rank")
        return
    if case.moved:
        yield Finding(SLOW_RANK, 0.5, text)
    else:
        sure = ratio > min(1 + 4 * noise, 2.0)
        yield Finding(SLOW_RANK, 5.0 if sure else 1.5, f"{text}; loss and gradients are as they were")
    yield Unanswered(SLOW_RANK, "which rank it is", "per-rank step times: python -m tools.preflight on the machines")


def replicas(case: Case) -> Iterator[Evidence]:
    """Read what the monitor's drift check found: copies that should be equal to the last bit and differ."""
    if case.layout["tensor"] == case.layout["pipeline"] == case.layout["data"] == 1:
        yield Finding(NORM_DRIFT, -9.0, "one rank has no copies")
        return
    every = case.recipe.monitor.drift_every_steps if case.stats is not None else 0
    drift = _reported_drift(case, every)
    if drift is None:
        checked = every and int(case.steps[-1]) // every * every >= case.onset
        if checked:
            yield Finding(NORM_DRIFT, -4.0, "the next drift check found all copies equal")
        else:
            cure = "train on to the next drift check" if every else "turn the drift check on (Recipe.monitor.drift_every_steps)"
            yield Unanswered(NORM_DRIFT, "whether copies of weights were still equal", cure)
        return
    found = [match.groups() for match in _DRIFT.finditer(drift)]
    parts = {group_of(name)[1] for name, _ in found}
    if {across for _, across in found} == {"data"}:
        yield Finding(BIT_FLIP, 6.0, f"drift check: {drift}")
        yield Finding(NORM_DRIFT, 3.0, f"drift check: {drift}")
    else:
        yield Finding(NORM_DRIFT, 8.0 if len(found) > 1 or parts <= {"norm", "router"} else 5.0, f"drift check: {drift}")
        yield Finding(BIT_FLIP, 1.0 if len(found) == 1 else -1.0, "the drift check names " + ", ".join(sorted(parts)))


def not_finite(case: Case) -> Iterator[Evidence]:
    """Read where the monitor first found a NaN or infinity in skipped steps (recipes.common.monitor.nonfinite)."""
    near = [(s, r.get("skip_reason", "")) for s, r in case.all_steps.items() if case.onset - 2 <= s <= case.step + 8]
    skipped = [(s, reason, _FIRST.match(reason)) for s, reason in sorted(near) if _FIRST.match(reason)]
    if not skipped:
        return
    step, reason, first = skipped[0]
    text = f"step {step} was skipped: {reason}"
    hit = _HIT.search(reason)
    if first["kind"] in (None, "weight"):
        yield Finding(BIT_FLIP, 6.0, text)
    elif hit is not None and len(skipped) > 2:
        # every micro batch of one rank, or of all, step after step: the weights are broken, not the data
        every = int(hit[1]) in (int(hit[2]) // case.layout["data"], int(hit[2]))
        yield Finding(BIT_FLIP, 5.0 if every else 3.0, f"{text}; and {len(skipped) - 1} steps after it, with other data")
        yield Finding(BAD_DOCUMENT, -4.0, "steps with other data were not finite either")
    else:
        yield Finding(BIT_FLIP, 1.0, text)
        yield Finding(BAD_DOCUMENT, 0.5, text)


def _reported_drift(case: Case, every: int) -> str | None:
    """Return what the first drift check after the onset found: in the step's record, or in the box of a run that it ended."""
    until = max(case.step, case.onset) + every
    for step, record in sorted(case.all_steps.items()):
        if case.onset <= step <= until and record.get("drift"):
            return str(record["drift"])
    for box in read_boxes(case.folder):
        found = list(_DRIFT.finditer(str(box.get("hopeless") or "")))
        if case.onset - 2 <= box["onset_step"] <= until and found:
            return "; ".join(match[0] for match in found)
    return None


_DRIFT = re.compile(r"(\S+) differs across (\w+) ranks")
_FIRST = re.compile(r"(NaN|Infinity) \(\d+ elements\) first in the (?P<kind>\w+) |not finite, and finite when")
_HIT = re.compile(r"in (\d+) of (\d+) micro batches")
