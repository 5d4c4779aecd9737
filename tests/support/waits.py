"""Counts where the host would wait for a GPU: operators that need a tensor's value, called on the CPU's tensors in its stead.

What a CPU has no part in, copies between host and device, is counted on fake CUDA tensors (tests/rehearsal) and refused on
real GPUs (tests/gpu).
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from recipes.common.recipe import ROOT

# operators whose result's shape, or a number for Python, depends on values
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2", "bincount"}


class Waits(TorchDispatchMode):
    """Counts, within, operators that would wait, by the file and line of whoever called them."""

    def __init__(self) -> None:
        super().__init__()
        self.by_line: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.by_line.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func._schema.name.split("::")[-1] in WAITING:
            self.by_line[_caller()] += 1
        return func(*args, **kwargs or {})


def _caller() -> str:
    """Return the first frame outside torch and this file."""
    frame = sys._getframe(2)
    while frame is not None and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return "?" if frame is None else line_of(frame.f_code.co_filename, frame.f_lineno)


def line_of(path: str, line: int) -> str:
    """Return file and line, without the folder that the repository or the environment lies in."""
    return f"{path.rsplit('site-packages/')[-1].removeprefix(f'{ROOT}/')}:{line}"
