"""Starts the process group and DeepSpeed.

We start the group ourselves, and DeepSpeed wraps it: it would bind the rank's device to it. NCCL then connects all ranks at
once, splits a communicator over all of them for every group, and puts all messages of a group on one stream, on which
"zero_bubble_v" can deadlock (recipes.common.pipeline.streams).
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from deepspeed.accelerator.real_accelerator import set_accelerator
from deepspeed.constants import default_pg_timeout

from recipes.common.engine.deepspeed_patches import patch_start
from recipes.common.recipe import RecipeError
from recipes.common.runtime.gpus import list_gpus, unusable_gpus_text
from recipes.common.runtime.network import choose_interface, free_port
from recipes.common.runtime.numa import bind_beside


def start_distributed(device_type: str) -> torch.device:
    """Join the process group that the launcher's environment describes, or start one alone. Returns this rank's device."""
    # DeepSpeed calls collectives by names that torch 2.13 deprecates: a warning a rank is enough noise to hide a real one
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")  # it is this rank's
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())  # no other rank will join
    choose_interface()
    use_accelerator(device_type)
    patch_start()
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        _take_gpu(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=default_pg_timeout)  # no device_id: see above
    with quiet_deepspeed():
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
    return device


def use_accelerator(device_type: str) -> None:
    """Let DeepSpeed work on "cuda" or "cpu", whatever it found when it was imported, here and in ranks forked from here."""
    if get_accelerator().device_name() != device_type:
        set_accelerator(CUDA_Accelerator() if device_type == "cuda" else CPU_Accelerator())


def _take_gpu(device: torch.device) -> None:
    """Make `device` this process's own, and run beside it. Raises RecipeError, with the cure, where torch cannot use it."""
    try:
        torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, AttributeError) as error:  # the last from a build without CUDA
        found = list_gpus()
        cause = unusable_gpus_text(*found, torch.__version__, torch.version.cuda) if found else "nvidia-smi lists no GPU"
        reason = str(error).strip().splitlines()[0]
        raise RecipeError(f"{device}, by LOCAL_RANK, cannot be used", [cause, f"torch says: {reason}"]) from error
    own = torch.cuda.get_device_properties(device)
    if hasattr(own, "pci_bus_id"):
        bind_beside(f"{own.pci_domain_id:04x}:{own.pci_bus_id:02x}:{own.pci_device_id:02x}.0")


def device_is_bound() -> bool:
    """Return whether the process group was started with a device, by whoever did: its groups then have one stream each."""
    return dist.group.WORLD is not None and dist.group.WORLD.bound_device_id is not None


@contextlib.contextmanager
def quiet_deepspeed() -> Iterator[None]:
    """Silence DeepSpeed, which prints its topology, stages and options while it is built; errors still pass."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(max(level, logging.WARNING))
