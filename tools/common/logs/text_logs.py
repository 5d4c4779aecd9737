"""Reads text logs of other programs, in the lines of `formats`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise
from pathlib import Path

from tools.common.console import UsageError
from tools.common.logs.cells import Commas
from tools.common.logs.formats import FORMATS, Format, number_after, number_in
from tools.common.logs.log import COLUMNS, Log, build_log
from tools.common.logs.log_open import describe, open_text
from tools.common.logs.ranks import PLACEHOLDER, Row, merge_ranks, rank_of
from tools.common.logs.step_counter import StepCounter

SNIFF_LINES = 2000  # after the first line of a known format: a log may hold two, and the richer one is wanted
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# printed by DeepSpeed between the steps: runtime/fp16/loss_scaler.py, fused_optimizer.py
SCALE = number_after(r"(?:Attempted loss scale: \S+, reducing|(?:Reducing|Increasing) dynamic loss scale from \S+) to ")
RESUMES = (
    (re.compile(r"loaded checkpoint .*at iteration (\d+)"), 0),  # Megatron
    (re.compile(r"Training starts at step (\d+)"), 1),  # torchtitan: the first step to come
)
SKIPPED = re.compile(r"\| number of skipped iterations:\s+(\d+)")
NOT_FINITE = re.compile(r"\| number of nan iterations:\s+(\d+)")


def read_text(path: Path) -> Log:
    """Read the steps of a text log. Raises UsageError, with what the file is and the known formats, when it is none of them."""
    with open_text(path) as file:
        found = sniff(file)
    if found is None:
        known = ", ".join(known.name.split(" ", 1)[1] for known in FORMATS)
        raise UsageError(
            f"{path} cannot be read as a log: {describe(path)}; no line of a known log, and no table with a `step` and a `loss`. "
            f"Known: {known}; CSV, W&B's CSV export, JSON lines, metrics.jsonl, trainer_state.json, TensorBoard event files, run "
            "directories"
        )
    with open_text(path) as file:
        rows, resumes = parse(file, found, str(path))
    if rows and all(row.values.get("loss") == PLACEHOLDER for row in rows):
        raise UsageError(
            f"{path} is {found.name} of a rank without the last pipeline stage: each loss is -1, which stands for none. Read the "
            "log of a rank that has the loss (torchtitan: the last stage's)"
        )
    merged = merge_ranks(rows)
    columns = {name: [values.get(name) for _, values in merged] for name in COLUMNS}
    if found.milliseconds:
        columns["seconds"] = [value and value / 1000 for value in columns["seconds"]]
    absent = sum(loss is None for loss in columns["loss"])
    notes = [f"{absent} of {len(merged)} steps are left out: their lines have no loss that is a number"] if absent else []
    return build_log(str(path), found.name, [step for step, _ in merged], columns, resumes, notes)


def sniff(lines: Iterable[str]) -> Format | None:
    """Return the richest of the formats of the first lines with steps."""
    lines = iter(lines)
    present: set[str] = set()
    for line in lines:
        present = _formats_of(line)
        if present:
            break
    for line in islice(lines, SNIFF_LINES):
        present |= _formats_of(line)
    return next((known for known in FORMATS if known.name in present), None)


def _formats_of(line: str) -> set[str]:
    line = COLOURS.sub("", line)
    return {known.name for known in FORMATS if known.step.search(line)}


def parse(lines: Iterable[str], found: Format, name: str) -> tuple[list[Row], list[int]]:
    """Return the rows of the log `name` in order, and the steps after which it resumed."""
    rows: list[Row] = []
    resumes: list[int] = []
    scale: float | None = None
    counter = StepCounter()
    commas = Commas(name, alone=found.block)
    for line, started, rank in _records(_plain(lines), found):
        if found.counted:
            counter.see(line)
        if started:
            counter.mark()
            rows.append(Row(rank, 0 if found.counted else int(started[1].replace(",", "")), {}))
            if scale is not None:
                rows[-1].values["loss_scale"] = scale
        if started or (found.block and rows):
            _take_numbers(line, found, rows[-1].values, commas)
        else:
            lowered = SCALE.search(line)
            scale = float(lowered[1].replace(",", "")) if lowered else scale
        for pattern, before in RESUMES:
            resumed = pattern.search(line)
            if resumed and int(resumed[1]) > before:
                resumes.append(int(resumed[1]) - before)
    if found.counted:
        rows = [Row(row.rank, step, row.values) for row, step in zip(rows, counter.steps(), strict=True)]
    return rows, list(dict.fromkeys(resumes))


def _records(lines: Iterable[str], found: Format) -> Iterator[tuple[str, re.Match[str] | None, str | None]]:
    """Yield (text, its step, its rank): a line, or each record of a line that several were written into."""
    for line in lines:
        starts = list(found.step.finditer(line))
        if len(starts) < 2 or found.block:
            yield line, starts[0] if starts else None, rank_of(line) if starts else None
            continue
        rank, begin, ends = rank_of(line), 0, [*(_end(line, *pair, found) for pair in pairwise(starts)), len(line)]
        for before, start, end in zip([None, *starts], starts, ends, strict=False):
            if before is not None:
                rank = rank_of(line[before.end() : start.start()].rpartition("|")[2]) or rank
            yield line[begin:end], start, rank
            begin = end


def _end(line: str, record: re.Match[str], following: re.Match[str], found: Format) -> int:
    """Return where a record ends in a line of several. A progress bar after it belongs to the one that follows."""
    closed = line.find("}", record.end(), following.start()) + 1 if found.counted else 0
    return closed or following.start()


def _take_numbers(line: str, found: Format, values: dict[str, float], commas: Commas) -> None:
    fields = {name: value for name, pattern in found.fields.items() if (value := pattern.search(line))}
    comma = commas.are_decimal([value[1] for value in fields.values()])
    for name, value in fields.items():
        values[name] = number_in(value, decimal_comma=comma)
    if found.omits_nan and "loss" not in values and _lost_its_loss(line, values):
        values["loss"] = math.nan


def _lost_its_loss(line: str, values: dict[str, float]) -> bool:
    """Whether a Megatron line lacks its loss because that was not finite.

    A step that the loss scaler skipped lacks it too: that is an overflow, as long as the scale can still fall.
    """
    not_finite, skipped = NOT_FINITE.search(line), SKIPPED.search(line)
    if not_finite and int(not_finite[1]):
        return True
    overflow = skipped is not None and int(skipped[1]) > 0 and values.get("loss_scale", math.inf) > 1
    return not math.isfinite(values.get("grad_norm", 0.0)) and not overflow


def _plain(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines without colours. A progress bar's carriage returns separate lines too."""
    for line in lines:
        yield from COLOURS.sub("", line).rstrip("\r\n").split("\r")
