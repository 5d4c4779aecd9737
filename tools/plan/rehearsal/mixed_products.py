"""Gives shapes to products of 16-bit factors that are written in fp32: torch has them on CUDA alone, and no shapes for them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def mixed_products() -> Iterator[None]:
    """Define them for tensors without memory."""
    with torch.library._scoped_library("aten", "IMPL", "Meta") as library:
        library.impl("mm.dtype", _mm)
        library.impl("addmm.dtype_out", _addmm_out)
        yield


def _mm(left: torch.Tensor, right: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    return left.new_empty(left.shape[0], right.shape[1], dtype=out_dtype)


def _addmm_out(
    known: torch.Tensor, left: torch.Tensor, right: torch.Tensor, out_dtype: torch.dtype, *, out: torch.Tensor, **factors: float
) -> torch.Tensor:
    return out
