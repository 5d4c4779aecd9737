"""Where a check of the GPU tier runs, and how it says what it found."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Figures = dict[str, Any]  # JSON types
PRECISIONS = ("fp32", "bf16")


class SkippedError(Exception):
    """What a check needs is not here; the message says what."""


class RefutedError(Exception):
    """What a check was to show is not so; the message says how far."""


@dataclass(frozen=True)
class Place:
    """One kind of device, how many ranks with one each, and a folder of the check's own."""

    device: str  # "cuda"; "cpu" tries the checks themselves, at tiny sizes
    ranks: int
    folder: Path

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def precisions(self) -> tuple[str, ...]:
        """Return the precisions that a check of equal bits goes through."""
        return PRECISIONS if self.on_gpu else PRECISIONS[-1:]


@dataclass(frozen=True)
class GpuCheck:
    """One check: a function of a place that returns its figures, or raises SkippedError or RefutedError."""

    name: str
    about: str  # what it shows, for the page
    run: Callable[[Place], Figures]
    ranks: int = 1  # it needs as many
    device_only: bool = False  # nothing to be seen on a CPU


def be_deterministic() -> None:
    """Choose kernels without atomics in this rank, for checks of equal bits; those that have none still run."""
    torch.use_deterministic_algorithms(True, warn_only=True)


def differing(a: dict[Any, torch.Tensor], b: dict[Any, torch.Tensor]) -> list[str]:
    """Return the names under which two sets of tensors differ in a bit, or that only one has."""
    return sorted(str(name) for name in a.keys() | b.keys() if name not in a or name not in b or not a[name].equal(b[name]))


def demand_equal(what: str, differ: Iterable[str]) -> None:
    """Raise RefutedError if any name is in `differ`."""
    names = list(differ)
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise RefutedError(f"{what} differ: {', '.join(names[:3])}{more}")
