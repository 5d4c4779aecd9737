"""Predicts the memory of a pipeline stage by class, and the driver's total.

Weights, gradients and optimizer states follow from the precision and the ZeRO stage. Stage i of p keeps the activations of
min(p - i, micro batches) micro batches (1F1B), and needs the working set of one layer and of the loss. Libraries add the CUDA
context, NCCL's and ZeRO's buffers; PyTorch's caching allocator adds memory that it holds unused: much while memory is plenty,
almost none when it runs out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tools.common.devices import GIB
from tools.plan.fitting import fit_map

CONTEXT_BYTES = 0.6 * GIB  # CUDA context and cuBLAS workspaces
GROUP_BYTES = 0.5 * GIB  # NCCL's buffers, a process group

# name -> (value by first principles, width of the prior)
TERMS: dict[str, tuple[float, float]] = {
    "states": (1.03, 0.15),  # weights, gradients, optimizer: flattening pads and aligns
    "stored": (1.0, 0.3),  # activations until their backward pass
    "working": (1.0, 0.5),  # one layer's own activations
    "loss": (1.0, 0.5),  # logits and their gradients
    "libraries": (1.0, 0.5),
    "held": (0.3, 1.0),  # the part of freed activations that the allocator keeps
}
PRIOR = np.array([value for value, _ in TERMS.values()])
WIDTHS = np.array([width for _, width in TERMS.values()])
NOISE = 0.03
SPREAD = 0.09  # 90th percentile of the relative error without a fit: BLOOM's in fp16, leaving one out at a time


@dataclass(frozen=True, kw_only=True)
class StageBytes:
    """One stage's bytes on one rank."""

    weights: float
    gradients: float
    optimizer: float
    stored: float  # activations of the micro batches in flight
    working: float
    loss: float
    in_flight: int

    @property
    def states(self) -> float:
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True, kw_only=True)
class MemoryCase:
    """A layout's stages and what they have in common."""

    stages: tuple[StageBytes, ...]
    libraries: float  # bytes
    capacity: float  # bytes


def library_bytes(groups: int, bucket_elements: float, gradient_bytes: float) -> float:
    """Return the bytes of CUDA, NCCL and ZeRO's buckets: three of gradients (filling, sent, flattened), two of 16-bit weights."""
    return CONTEXT_BYTES + GROUP_BYTES * groups + bucket_elements * (3.0 * gradient_bytes + 2.0 * 2.0)


def loss_bytes(logits: float, head: float, width: float, *, compiled: bool) -> float:
    """Return the bytes of a chunk's loss and of the head's gradient, from their elements.

    width: bytes of an activation. The logits' gradient takes their place, beside exponentials in fp32 unless a kernel is compiled
    for it; the head's is added up in fp32, and rescaled in the weights' precision.
    """
    return (width + (0.0 if compiled else 4.0)) * logits + (width + 4.0) * head


def stage_totals(terms: np.ndarray, case: MemoryCase) -> np.ndarray:
    """Return the bytes [stages] that the driver would show at the peak; of terms [k, m], m guesses, [stages, m]."""
    k = dict(zip(TERMS, terms, strict=True))
    states = np.array([k["states"] * stage.states for stage in case.stages])
    moving = np.array([k["stored"] * s.stored + k["working"] * s.working + k["loss"] * s.loss for s in case.stages])
    need = states + moving + k["libraries"] * case.libraries
    return need + k["held"] * moving * np.maximum(1.0 - need / case.capacity, 0.0)


def peak_bytes(terms: np.ndarray, cases: Sequence[MemoryCase]) -> np.ndarray:
    """Return the bytes [n] of each case's fullest stage; of terms [k, m], m guesses, [n, m]."""
    return np.array([stage_totals(terms, case).max(axis=0) for case in cases])


def fit_memory(cases: Sequence[MemoryCase], measured: np.ndarray, prior: np.ndarray = PRIOR) -> np.ndarray:
    """Fit the terms to `measured` bytes [n]."""
    return fit_map(lambda terms: peak_bytes(terms, cases), measured, prior, WIDTHS, noise=NOISE)


def state_bytes(
    precision: str, zero_stage: int, data: int, *, moments: int = 2, offload: bool = False
) -> tuple[float, float, float]:
    """Return the bytes a parameter of (weights, gradients, optimizer states), as our ds_configs set DeepSpeed up.

    moments: fp32 states of the optimizer beside the fp32 master weights (AdamW 2). Gradients accumulate in fp32: whole up to
    ZeRO 1; under ZeRO 2 each rank's partition, beside `whole_gradient_bytes`. Under ZeRO 1 fp32 weights are their own master
    weights.
    `tests/tools/plan/test_memory_model.py` compares these with the tensors of real engines.
    """
    weights, own = (4.0 if precision == "fp32" else 2.0), 0.0 if precision == "fp32" and zero_stage == 1 else 4.0
    masters = 0.0 if offload else (own + 4.0 * moments) / data
    if zero_stage == 3:
        return weights / data, 4.0 / data, masters
    return weights, (4.0 if zero_stage <= 1 else 4.0 / data), masters


def whole_gradient_bytes(precision: str, zero_stage: int, params: float, bucket_elements: float) -> float:
    """Return the bytes of gradients in the weights' precision that wait for their reduction: under ZeRO 2 a bucket's at most."""
    return (4.0 if precision == "fp32" else 2.0) * min(params, bucket_elements) if zero_stage == 2 else 0.0


def interval(peak: float, spread: float | None = None) -> tuple[float, float]:
    """Return the interval of nine in ten measured peaks. spread: the 90th percentile of relative errors."""
    spread = SPREAD if spread is None else spread
    return peak * (1 - spread), peak * (1 + spread)
