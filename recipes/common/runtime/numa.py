"""Keeps a rank on the processors beside its GPU, where a host has several NUMA nodes.

What a rank copies to its GPU and back then crosses no link between processors: memory lies on the node of the thread that first
writes it. On hosts of one node nothing changes, nor where a launcher or the user has bound the rank already.
"""

from __future__ import annotations

import os
from pathlib import Path

SYS = Path("/sys")


def bind_beside(pci_address: str, sys: Path = SYS) -> set[int]:
    """Bind this thread, and those that it will start, to the processors of a PCI device's node.

    pci_address: as in 0000:3b:00.0. Returns the processors; none if nothing was bound.
    """
    cpus = cpus_beside(pci_address, os.sched_getaffinity(0), sys)
    if cpus:
        os.sched_setaffinity(0, cpus)
    return cpus


def cpus_beside(pci_address: str, allowed: set[int], sys: Path = SYS) -> set[int]:
    """Return the processors to bind to; none where the kernel does not know, there is one node, or a choice was made already."""
    try:
        nodes = {path.name: _cpus((path / "cpulist").read_text()) for path in (sys / "devices/system/node").glob("node[0-9]*")}
        own = f"node{int((sys / 'bus/pci/devices' / pci_address.lower() / 'numa_node').read_text())}"
    except (OSError, ValueError):
        return set()
    nodes = {name: cpus for name, cpus in nodes.items() if cpus}  # others are memory alone
    if len(nodes) < 2 or own not in nodes or allowed != set().union(*nodes.values()):
        return set()
    return nodes[own]


def _cpus(text: str) -> set[int]:
    """Parse the kernel's lists: 0-15,32-47."""
    found: set[int] = set()
    for part in text.strip().split(",") if text.strip() else ():
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found
