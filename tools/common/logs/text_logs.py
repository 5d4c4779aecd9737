"""Reads text logs as other programs print them. Each format's source is named beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tools.common.console import UsageError
from tools.common.logs.log import Log, build_log, open_text

NUMBER = r"([-+]?(?:\d[\d,]*\.?\d*(?:[eE][-+]?\d+)?|\.\d+|nan|inf))"
SNIFF_LINES = 2000  # after the first line of a known format: a log may hold two, and the richer one is wanted


@dataclass(frozen=True)
class Format:
    """Patterns of the line that starts a step, and of the numbers in it and (if `block`) in the lines up to the next step."""

    name: str
    step: re.Pattern[str]
    fields: dict[str, re.Pattern[str]]
    block: bool = False
    milliseconds: bool = False  # of `seconds`


def number_after(text: str) -> re.Pattern[str]:
    return re.compile(text + NUMBER, re.IGNORECASE)


# The first format that a log has wins: Megatron-DeepSpeed prints DeepSpeed's lines too.
FORMATS = (
    Format(
        "a Megatron, Megatron-DeepSpeed or GPT-NeoX log",  # megatron/training/training.py, megatron/logging.py: training_log
        re.compile(r"iteration\s+(\d+)/\s*\d+ \|"),
        {
            "loss": number_after(r"\| lm[ _]loss(?: value)?: "),
            "grad_norm": number_after(r"\| grad[ _]norm: "),
            "lr": number_after(r"\| learning rate: "),
            "loss_scale": number_after(r"\| loss[ _]scale: "),
            "seconds": number_after(r"\| elapsed time per iteration \(ms\): "),
        },
        milliseconds=True,
    ),
    Format(
        "an OLMo or OLMo-core log",  # olmo/train.py: log_metrics_to_console; olmo_core/train/callbacks/console_logger.py
        re.compile(r"\[step=([\d,]+)/"),
        {
            "loss": number_after(r"^\s*train/(?:CE loss|CrossEntropyLoss)="),
            "grad_norm": number_after(r"^\s*optim/total[ _]grad[ _]norm="),
            "lr": number_after(r"^\s*optim/(?:LR|learning_rate_group0)(?: \(group 0\))?="),
        },
        block=True,
    ),
    Format(
        "a torchtitan log",  # torchtitan/components/metrics.py
        re.compile(r"\bstep:\s*(\d+)\s+loss:"),
        {"loss": number_after(r"\bloss:\s*"), "grad_norm": number_after(r"\bgrad_norm:\s*"), "lr": number_after(r"\blr:\s*")},
    ),
    Format(
        "an llm.c log",  # train_gpt2.cu, stdout
        re.compile(r"^step\s+(\d+)/\d+ \| loss "),
        {
            "loss": number_after(r"\| loss "),
            "grad_norm": number_after(r"\| norm "),
            "lr": number_after(r"\| lr "),
            "seconds": re.compile(r"\| " + NUMBER + r" ms \|"),
        },
        milliseconds=True,
    ),
    Format(
        "an llm.c main.log",  # llmc/logger.h: logger_log_train
        re.compile(r"^s:(\d+) trl:"),
        {"loss": number_after(r" trl:"), "grad_norm": number_after(r" norm:"), "lr": number_after(r" lr:")},
    ),
    Format(
        "a modded-nanogpt log",  # train_gpt.py: print0
        re.compile(r"\bstep:(\d+)/\d+ train_loss:"),
        {"loss": number_after(r"\btrain_loss:")},
    ),
    Format(
        "a nanoGPT log",  # train.py
        re.compile(r"^iter (\d+): loss "),
        {"loss": number_after(r": loss "), "seconds": re.compile(r", time " + NUMBER + "ms")},
        milliseconds=True,
    ),
    Format(
        "a DeepSpeed pipeline engine's log",  # deepspeed/runtime/pipe/engine.py: train_batch
        re.compile(r"\bsteps: (\d+) loss: "),
        {"loss": number_after(r"\bsteps: \d+ loss: "), "seconds": number_after(r"\biter time \(s\): ")},
    ),
)

COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# printed by DeepSpeed between the steps: runtime/fp16/loss_scaler.py, fused_optimizer.py
SCALE = number_after(r"(?:Attempted loss scale: \S+, reducing|(?:Reducing|Increasing) dynamic loss scale from \S+) to ")
RESUMES = (
    (re.compile(r"loaded checkpoint .*at iteration (\d+)"), 0),  # Megatron
    (re.compile(r"Training starts at step (\d+)"), 1),  # torchtitan: the first step to come
)


def read_text(path: Path) -> Log:
    """Read the steps of a text log. Raises UsageError, with the known formats, when it is none of them."""
    with open_text(path) as file:
        found = sniff(file)
    if found is None:
        known = ", ".join(known.name.split(" ", 1)[1] for known in FORMATS)
        raise UsageError(
            f"{path}: no line of a known log, and no table with a `step` and a `loss`. Known: {known}; CSV, W&B's CSV export, "
            "metrics.jsonl, TensorBoard event files, run directories"
        )
    with open_text(path) as file:
        rows, resumes = parse(file, found)
    columns = {name: [row.get(name) for _, row in rows] for name in ("loss", "grad_norm", "lr", "loss_scale", "seconds")}
    if found.milliseconds:
        columns["seconds"] = [value and value / 1000 for value in columns["seconds"]]
    return build_log(str(path), found.name, [step for step, _ in rows], columns, resumes)


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


def parse(lines: Iterable[str], found: Format) -> tuple[list[tuple[int, dict[str, float]]], list[int]]:
    """Return (step, its numbers) of each step in order, and the steps after which the log resumed."""
    rows: list[tuple[int, dict[str, float]]] = []
    resumes: list[int] = []
    scale: float | None = None
    for line in _plain(lines):
        started = found.step.search(line)
        if started:
            rows.append((int(started[1].replace(",", "")), {}))
            if scale is not None:
                rows[-1][1]["loss_scale"] = scale
        if started or (found.block and rows):
            for name, pattern in found.fields.items():
                value = pattern.search(line)
                if value:
                    rows[-1][1][name] = float(value[1].replace(",", ""))
        else:
            lowered = SCALE.search(line)
            scale = float(lowered[1].replace(",", "")) if lowered else scale
        for pattern, before in RESUMES:
            resumed = pattern.search(line)
            if resumed and int(resumed[1]) > before:
                resumes.append(int(resumed[1]) - before)
    return rows, list(dict.fromkeys(resumes))


def _plain(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines without colours. A progress bar's carriage returns separate lines too."""
    for line in lines:
        yield from COLOURS.sub("", line).rstrip("\r\n").split("\r")
