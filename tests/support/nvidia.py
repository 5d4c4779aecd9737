"""Plants a program that answers as nvidia-smi does on a machine with GPUs."""

from __future__ import annotations

import os
from pathlib import Path


def plant_nvidia_smi(folder: Path, *, count: int, driver: str = "535.54.03", exit_code: int = 0) -> str:
    """Write it to `folder`. Returns a PATH that finds it first.

    It answers `--query-gpu=FIELD,...`; fields that it does not know are "[N/A]", queries of another kind have no rows.
    """
    rows = [
        {
            "uuid": f"GPU-{index}",
            "name": "NVIDIA H100 80GB HBM3",
            "driver_version": driver,
            "memory.used": "0",
            "memory.total": "81559",
            "pci.bus_id": f"00000000:{index + 1:02X}:00.0",
            "index": str(index),
        }
        for index in range(count)
    ]
    program = folder / "nvidia-smi"
    program.write_text(
        f"#!{os.path.realpath('/proc/self/exe')}\n"
        "import sys\n"
        f"rows = {rows!r}\n"
        "for word in sys.argv[1:]:\n"
        "    if word.startswith('--query-gpu='):\n"
        "        for row in rows:\n"
        "            print(', '.join(row.get(field, '[N/A]') for field in word.split('=')[1].split(',')))\n"
        f"sys.exit({exit_code})\n"
    )
    program.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"
