"""Holds the lines of text logs as programs print them: how each says its step and its numbers. Sources are named beside them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tools.common.logs.cells import INF, NAN, number_of

STEP = r"(\d+(?:,\d+)*)"
NUMBER = rf"({NAN}|{INF}|[-+]?(?:\d+(?:,\d+)*\.?\d*(?:[eE][-+]?\d+)?|\.\d+))"
LETTERS = r"([KMGBTP]\b)?"
POWERS = {"K": 1, "M": 2, "G": 3, "B": 3, "T": 4, "P": 5}


@dataclass(frozen=True)
class Format:
    """Patterns of the line that starts a step, and of the numbers in it and (if `block`) in the lines up to the next step."""

    name: str
    step: re.Pattern[str]
    fields: dict[str, re.Pattern[str]]
    block: bool = False
    milliseconds: bool = False  # of `seconds`
    omits_nan: bool = False  # it leaves out a loss that is not above zero, so one that is not finite too
    counted: bool = False  # its lines do not say which step: a progress bar between them does, or nothing


def number_after(text: str, letters: str = "") -> re.Pattern[str]:
    return re.compile(text + NUMBER + letters, re.IGNORECASE)


def number_in(found: re.Match[str], *, decimal_comma: bool = False) -> float:
    """Return the number of a field: its letter, where the format has any, is a power of a thousand."""
    letter = found[2] if found.re.groups > 1 else None
    number = number_of(found[1], decimal_comma=decimal_comma)
    number = float(found[1].replace(",", "")) if number is None else number
    return number * (1000.0 ** POWERS[letter.upper()] if letter else 1.0)


# The first format that a log has wins: Megatron-DeepSpeed prints DeepSpeed's lines too.
FORMATS = (
    Format(
        "a Megatron, Megatron-DeepSpeed or GPT-NeoX log",  # megatron/training/training.py, megatron/logging.py: training_log
        re.compile(r"(?<!, )iteration\s+" + STEP + r"/\s*[\d,]+ \|"),  # NeMo's follow a comma
        {
            "loss": number_after(r"\| lm[ _]loss(?: value)?: "),
            "grad_norm": number_after(r"\| grad[ _]norm: "),
            "lr": number_after(r"\| learning rate: "),
            "loss_scale": number_after(r"\| loss[ _]scale: "),
            "seconds": number_after(r"\| elapsed time per iteration \(ms\): "),
        },
        milliseconds=True,
        omits_nan=True,
    ),
    Format(
        "an OLMo or OLMo-core log",  # olmo/train.py: log_metrics_to_console; olmo_core/train/callbacks/console_logger.py
        re.compile(r"\[step=" + STEP + "/"),
        {
            "loss": number_after(r"^\s*train/(?:CE loss|CrossEntropyLoss)="),
            "grad_norm": number_after(r"^\s*optim/total[ _]grad[ _]norm="),
            "lr": number_after(r"^\s*optim/(?:LR|learning_rate_group0)(?: \(group 0\))?="),
        },
        block=True,
    ),
    Format(
        "a torchtitan log",  # torchtitan/components/metrics.py
        re.compile(r"\bstep:\s*" + STEP + r"\s+loss:"),
        {"loss": number_after(r"\bloss:\s*"), "grad_norm": number_after(r"\bgrad_norm:\s*"), "lr": number_after(r"\blr:\s*")},
    ),
    Format(
        "an llm.c log",  # train_gpt2.cu, stdout
        re.compile(r"(?<![a-z] )step\s+" + STEP + r"/[\d,]+ \| loss "),
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
        re.compile(r"(?<![a-z])s:" + STEP + " trl:"),
        {"loss": number_after(r" trl:"), "grad_norm": number_after(r" norm:"), "lr": number_after(r" lr:")},
    ),
    Format(
        "a modded-nanogpt log",  # train_gpt.py: print0
        re.compile(r"step:" + STEP + r"/[\d,]+ train_loss:"),
        {"loss": number_after(r"\btrain_loss:")},
    ),
    Format(
        "a nanoGPT log",  # train.py
        re.compile(r"(?<![a-z] )iter " + STEP + ": loss "),
        {"loss": number_after(r": loss "), "seconds": re.compile(r", time " + NUMBER + "ms")},
        milliseconds=True,
    ),
    Format(
        "a DeepSpeed pipeline engine's log",  # deepspeed/runtime/pipe/engine.py: train_batch
        re.compile(r"steps: " + STEP + " loss: "),
        {"loss": number_after(r"steps: [\d,]+ loss: "), "seconds": number_after(r"\biter time \(s\): ")},
    ),
    Format(
        "a nanotron log",  # nanotron/logging/base.py: human_format, three digits and a letter
        re.compile(r"\biteration: " + STEP + r" / [\d,]+ \|"),
        {
            "loss": number_after(r"\| lm_loss: ", LETTERS),
            "grad_norm": number_after(r"\| grad_norm: ", LETTERS),
            "lr": number_after(r"\| lr: ", LETTERS),
            "seconds": number_after(r"\| elapsed_time_per_iteration_ms: ", LETTERS),
        },
        milliseconds=True,
    ),
    Format(
        "a NeMo log",  # nemo/lightning/pytorch/callbacks/progress_printer.py
        re.compile(r"Training epoch \d+, iteration \d+/\d+ \|.*?\| global_step: " + STEP + r" \|.*?\breduced_train_loss: "),
        {
            "loss": number_after(r"\breduced_train_loss: "),
            "grad_norm": number_after(r"\| grad_norm: "),
            "lr": number_after(r"\| lr: "),
            "seconds": number_after(r"\| train_step_timing in s: "),
        },
    ),
    Format(
        "a NeMo progress bar",  # pytorch_lightning/callbacks/progress/tqdm_progress.py: five characters a number at least
        re.compile(r"\bEpoch \d+:.*?\breduced_train_loss=.*?\bglobal_step=" + STEP),
        {
            "loss": number_after(r"\breduced_train_loss="),
            "grad_norm": number_after(r"\bgrad_norm="),
            "lr": number_after(r"\blr="),
            "seconds": number_after(r"\btrain_step_timing in s="),
        },
    ),
    Format(
        "a Hugging Face console log",  # transformers/trainer_callback.py: ProgressCallback.on_log prints a dictionary
        re.compile(r"""\{['"]loss['"]: .*?['"]epoch['"]: """),
        {
            "loss": number_after(r"""\{['"]loss['"]: ['"]?"""),
            "grad_norm": number_after(r"""['"]grad_norm['"]: ['"]?"""),
            "lr": number_after(r"""['"]learning_rate['"]: ['"]?"""),
        },
        counted=True,
    ),
)
