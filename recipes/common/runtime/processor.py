"""Tells what processor this machine has."""

from __future__ import annotations

import functools
from pathlib import Path

import torch


@functools.cache
def is_intel(told: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether the processor is Intel's. told: where Linux says so; a machine without is not."""
    try:
        lines = told.read_text().splitlines()
    except OSError:
        return False
    return any(line.split() == ["vendor_id", ":", "GenuineIntel"] for line in lines)


@functools.cache
def onednn_is_faster() -> bool:
    """Return whether oneDNN computes fp32 products faster than MKL, which leaves AVX-512 unused where it is not Intel's.

    With AVX2 both run alike (78 GFLOP/s a core of an AMD EPYC), and MKL reads transposed factors faster.
    """
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and not is_intel()
