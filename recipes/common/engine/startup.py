"""Starting DeepSpeed and the process group."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import warnings
from collections.abc import Iterator

import deepspeed
import torch
import torch.distributed as dist

from recipes.common.runtime.network import choose_interface, free_port


def _import_muon_uncompiled() -> None:
    """ZeRO imports DeepSpeed's Muon optimizer, which torch.compiles three functions as it is imported: 2.4 s a rank, unused."""
    compile_, torch.compile = torch.compile, lambda function=None, **_: function or (lambda decorated: decorated)
    try:
        with contextlib.suppress(ImportError):  # it came with DeepSpeed 0.19
            importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        torch.compile = compile_


def start_distributed(device_type: str) -> torch.device:
    """Join the process group that the launcher's environment describes; alone when there is none. Gives this rank's device."""
    # DeepSpeed calls collectives by the names that torch 2.13 deprecates: once a rank is noise enough to hide a real warning
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())  # nobody else is to come
    choose_interface()
    # On CPU DeepSpeed would look for compilers and build an extension at start (25 s, and a stale lock hangs the next run) that
    # training never uses. With an empty list of operators it does neither.
    deepspeed.ops.__compatible_ops__ = {}
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
    """DeepSpeed prints its topology, stages and options while it is built; errors still pass."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(max(level, logging.WARNING))
