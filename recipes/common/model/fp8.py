"""Multiplies matrices in fp8 (arXiv 2209.05433): values in e4m3, gradients in e5m2, with a scale a tensor, found as it is cast.

A scale is the largest power of two that keeps the tensor's largest element within the format's range. Multiplying by it is exact,
so an element is rounded alike whatever else is in the tensor, until it is 2^-15 of the largest (in e5m2 2^-30) and the format has
no more digits for it. So a rank's own shard, its part of a sequence or of a batch has a scale of its own, no message is needed,
and every layout rounds to the same numbers. Sums are fp32, results have the factors' precision. Factors are kept as they were,
and cast whenever they are multiplied.

torch has the products: on GPUs tensor cores compute them (compute capability 8.9 and newer), on CPUs it emulates them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.functional import ScalingType

VALUES, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # of elements that tensor cores read at once: the widths of the matrices must be multiples
_LEAST = 2.0**-100  # stands for the largest element of a tensor of zeros
_TENSORWISE = ScalingType.TensorWise


@dataclass(frozen=True)
class Scale:
    """How a tensor is cast to a kind of fp8."""

    kind: torch.dtype
    scale: torch.Tensor  # by which the tensor is multiplied before; fp32, without a dimension
    step: torch.Tensor  # its inverse, what one of the result's units stands for

    def cast(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return the matrix in fp8, row by row in memory."""
        into = torch.empty(matrix.shape, dtype=self.kind, device=matrix.device)  # in one kernel: reads the matrix, writes fp8
        return torch.mul(matrix.detach(), self.scale, out=into)


def scale_of(tensor: torch.Tensor, kind: torch.dtype) -> Scale:
    """Return the scale of a tensor. A NaN or an infinity makes a product all NaN, and so reaches the gradients' norm."""
    largest = torch.linalg.vector_norm(tensor, float("inf"), dtype=torch.float32)
    scale = (torch.finfo(kind).max / largest.clamp(min=_LEAST)).log2_().floor_().exp2_()
    return Scale(kind, scale, scale.reciprocal())


class Fp8Products:
    """The three products of one call of a linear. Its factors' scales are found once, and serve forward and backward."""

    def __init__(self, x: torch.Tensor, matrix: torch.Tensor) -> None:
        """x: [..., in]. matrix: [out, in]."""
        self._inputs, self._weight = scale_of(x, VALUES), scale_of(matrix, VALUES)
        self._gradients: Scale | None = None

    def forward(self, x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Compute x @ matrix^T + bias. Tensor cores may sum with fewer digits here."""
        rows = x.reshape(-1, x.shape[-1])
        out = _product(rows, self._inputs, matrix.t(), self._weight, fast=True).view(*x.shape[:-1], -1)
        return out if bias is None else out + bias

    def of_input(self, gradients: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """Compute the input's gradient, of the outputs' [n, out]."""
        return _product(gradients, self._scale_of_gradients(gradients), matrix, self._weight)

    def of_weight(self, gradients: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Compute the weight's gradient, of the outputs' [out, n] and the inputs [n, in]."""
        return _product(gradients, self._scale_of_gradients(gradients), rows, self._inputs)

    def _scale_of_gradients(self, gradients: torch.Tensor) -> Scale:
        if self._gradients is None:
            self._gradients = scale_of(gradients, GRADIENTS)
        return self._gradients


def _product(left: torch.Tensor, of_left: Scale, right: torch.Tensor, of_right: Scale, *, fast: bool = False) -> torch.Tensor:
    a, b = of_left.cast(left), of_right.cast(right.t())  # both are read along the dimension that is summed
    if short := -left.shape[1] % MULTIPLE:  # tokens, of which there may be any number
        a, b = F.pad(a, (0, short)), F.pad(b, (0, short))
    options = {"output_dtype": left.dtype, "use_fast_accum": fast}
    return F.scaled_mm(a, b.t(), of_left.step, _TENSORWISE, of_right.step, _TENSORWISE, **options)
