"""Computes learning rate, batch and warm-up for a model and a number of tokens, by published rules, each with its source."""

from __future__ import annotations

import math
from dataclasses import dataclass

WARMUP_STEPS = 2000  # DeepSeek LLM and Llama 2 (arXiv 2401.02954, 2307.09288)
LEAST_STEPS = 500  # with fewer steps the batch is made smaller: a schedule needs steps


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """Plain numbers, each with a sentence on where it comes from."""

    lr: float
    global_seqs: int
    steps: int
    warmup_steps: int
    lr_source: str
    batch_source: str
    warmup_source: str


def hyperparameters(layer_params: float, tokens: float, seq_len: int, seqs_unit: int) -> Hyperparameters:
    """Compute the hyperparameters of a run.

    layer_params: multiply-adds a token in the layers, forward. seqs_unit: the batch must be a multiple of it. arXiv 2401.02954
    (section 3.1): with C = 3 x 2 x layer_params x tokens FLOPs (attention in, vocabulary out), the best peak learning rate is
    0.3118 C^-0.125 and the best batch 0.2920 C^0.3271 tokens. Fitted there from 1e17 to 2e19 FLOPs, confirmed at 1e24.
    """
    compute = 6.0 * layer_params * tokens
    batch_tokens = 0.2920 * compute**0.3271
    few = tokens / LEAST_STEPS < batch_tokens
    wanted = min(batch_tokens, tokens / LEAST_STEPS) / seq_len
    # the nearest power of two divides evenly over most layouts; other units take the nearest multiple
    power = 2 ** max(round(math.log2(wanted)), 0)
    global_seqs = power if power % seqs_unit == 0 else max(round(wanted / seqs_unit), 1) * seqs_unit
    steps = math.ceil(tokens / (global_seqs * seq_len))
    hundredth = max(steps // 100, 1)
    warmup = min(WARMUP_STEPS, max(hundredth, min(100, steps // 10)))
    lr = _two_digits(0.3118 * compute**-0.125)
    rule = f"C = {compute:.1e} FLOPs (arXiv 2401.02954, 3.1)"
    return Hyperparameters(
        lr=lr,
        global_seqs=global_seqs,
        steps=steps,
        warmup_steps=warmup,
        lr_source=f"0.3118 C^-0.125, {rule}",
        batch_source=f"{global_seqs * seq_len:,} tokens a step: "
        + (f"{LEAST_STEPS} steps at least" if few else f"0.2920 C^0.3271 = {batch_tokens:,.0f}, {rule}")
        + ("" if global_seqs * seq_len < 2 * batch_tokens else "; raised to give every data rank a micro batch"),
        warmup_source=f"{WARMUP_STEPS} steps (arXiv 2401.02954)"
        if warmup == WARMUP_STEPS
        else f"{warmup / steps:.1%} of the run",
    )


def _two_digits(value: float) -> float:
    return float(f"{value:.1e}")
