"""Tells whose processor this machine has."""

from __future__ import annotations

import functools
from pathlib import Path


@functools.cache
def is_intel(told: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether the processor is Intel's. told: where Linux says so; a machine without is not."""
    try:
        lines = told.read_text().splitlines()
    except OSError:
        return False
    return any(line.split() == ["vendor_id", ":", "GenuineIntel"] for line in lines)
