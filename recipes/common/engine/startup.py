"""Starts DeepSpeed and the process group."""

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

from recipes.common.engine.deepspeed_patches import patch_start
from recipes.common.runtime.network import choose_interface, free_port


def start_distributed(device_type: str) -> torch.device:
    """Join the process group that the launcher's environment describes, or start one alone. Returns this rank's device."""
    # DeepSpeed calls collectives by names that torch 2.13 deprecates: a warning a rank is enough noise to hide a real one
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())  # no other rank will join
    choose_interface()
    patch_start()
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        with quiet_deepspeed():
            deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
    return device


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
