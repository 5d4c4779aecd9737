"""Computes the same matrix product on every rank, to find slow ranks and wrong results.

The factors are small integers, so every order of summation gives the same result, and a rank with another one computes wrongly.
Time is the thread's on CPU, where ranks may share cores, and wall time on a GPU.
"""

from __future__ import annotations

import platform
import statistics
import time
from typing import Any

import torch

SIZES = {"cuda": 8192, "cpu": 384}  # rows and columns of the factors
REPEATS = {"cuda": 20, "cpu": 9}


def device_facts(device_type: str, local_rank: int) -> dict[str, Any]:
    """Return the device this rank would train on, or why it has none."""
    if device_type != "cuda":
        return {"name": platform.machine(), "uuid": None}
    count = torch.cuda.device_count()
    if local_rank >= count:
        return {"error": f"LOCAL_RANK={local_rank} but {count} GPUs are visible"}
    torch.cuda.set_device(local_rank)
    properties = torch.cuda.get_device_properties(local_rank)
    free, total = torch.cuda.mem_get_info()
    memory = {"free_bytes": free, "total_bytes": total}
    capability = [properties.major, properties.minor]
    return {"name": properties.name, "uuid": str(properties.uuid), "capability": capability, **memory}


def product_facts(device: torch.device) -> dict[str, Any]:
    """Return {"seconds": median of one product, "flops_per_second", "result": a number that depends on every element}."""
    size = SIZES[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # partial sums in bf16 would round
    index = torch.arange(size * size, device=device).view(size, size)
    left, right = ((index * step % 13 - 6).to(dtype) for step in (7, 11))
    product = left @ right
    seconds = statistics.median(_timed(left, right) for _ in range(REPEATS[device.type]))
    weights = index % 1021 + 1
    result = int((product.double().to(torch.int64) * weights).sum())
    return {"seconds": seconds, "flops_per_second": 2 * size**3 / seconds, "result": result}


def _timed(left: torch.Tensor, right: torch.Tensor) -> float:
    clock = time.perf_counter if left.is_cuda else time.thread_time
    wait(left.device)
    started = clock()
    left @ right
    wait(left.device)
    return clock() - started


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
