"""Tells a torch without CUDA what operators it has there, for tensors that have no memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_WHOLE = ("silu_backward", "mish_backward")


@contextlib.contextmanager
def cuda_operators() -> Iterator[None]:
    """Give shapes to products of 16-bit factors that are written in fp32, and let autograd see what is one kernel on CUDA.

    Where it sees none it computes by six, which hold four tensors more.
    """
    scoped = torch.library._scoped_library
    with scoped("aten", "IMPL", "Meta") as shapes, scoped("aten", "IMPL", "CUDA") as kernels:
        shapes.impl("mm.dtype", _mm)
        shapes.impl("addmm.dtype_out", _addmm_out)
        for name in _WHOLE:
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CUDA"):
                kernels.impl(name, _never_runs)
        yield


def _never_runs(*args: torch.Tensor) -> torch.Tensor:
    raise AssertionError("a tensor with memory on a device that stands in for one")


def _mm(left: torch.Tensor, right: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    return left.new_empty(left.shape[0], right.shape[1], dtype=out_dtype)


def _addmm_out(
    known: torch.Tensor, left: torch.Tensor, right: torch.Tensor, out_dtype: torch.dtype, *, out: torch.Tensor, **factors: float
) -> torch.Tensor:
    return out
