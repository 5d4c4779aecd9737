"""Finds GPUs that a machine has and torch cannot use: a run would train on its CPUs, in silence and a hundred times slower."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping

import torch

from recipes.common.config.arguments import launch_problems

HIDDEN = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES by which a user hides all GPUs


def place_problems(environment: Mapping[str, str]) -> list[str]:
    """Return what keeps a rank from starting in this place: its launcher's variables, GPUs that torch cannot use."""
    from deepspeed.accelerator import get_accelerator  # here, not above: it takes seconds, which preflight's ranks save

    unused = unused_gpus(get_accelerator().device_name(), environment)
    return [*launch_problems(environment), *([unused] if unused is not None else [])]


def unused_gpus(device_type: str, environment: Mapping[str, str]) -> str | None:
    """Return why this machine's GPUs are not used, and the cure; None where they are, there are none, or the user wants it so.

    device_type: what DeepSpeed has found to train on.
    """
    wanted = environment.get("DS_ACCELERATOR") == "cpu" or environment.get("CUDA_VISIBLE_DEVICES") in HIDDEN
    if device_type != "cpu" or wanted:
        return None
    found = list_gpus()
    return unusable_gpus_text(*found, torch.__version__, torch.version.cuda) if found else None


def list_gpus() -> tuple[list[str], str] | None:
    """Return (names, the driver's version) as nvidia-smi says them; None if there is none, or it lists no GPU."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    rows = [row for row in rows if len(row) == 2]
    return ([name for name, _ in rows], rows[0][1]) if rows and done.returncode == 0 else None


def unusable_gpus_text(names: list[str], driver: str, torch_version: str, built_for: str | None) -> str:
    """Describe GPUs that nvidia-smi lists and torch cannot use. built_for: the CUDA that torch was built for."""
    listed = f"nvidia-smi lists {len(names)} GPU{'s' * (len(names) > 1)} ({names[0]}, driver {driver})"
    if built_for is None:
        cause = f"torch {torch_version} is a build for the CPU and sees none; install its build for CUDA"
    else:
        cause = (
            f"torch {torch_version}, built for CUDA {built_for}, can use none: the driver is too old for it, or broken; update "
            "the driver, or install a torch built for an older CUDA"
        )
    return f"{listed}, but {cause}; DS_ACCELERATOR=cpu trains on the CPU"
