"""Says what a host and its libraries are: processor, GPUs, driver, firmware, CUDA, NCCL, threads, switches of torch."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_DRIVER = Path("/proc/driver/nvidia")
_INFINIBAND = Path("/sys/class/infiniband")


def host_facts() -> dict[str, Any]:
    """Return what belongs to a host, without a prefix: "name", "cpu", "firmware.nvidia", ..., where it can be read."""
    facts = {"name": socket.gethostname(), "kernel": platform.release(), "cpus": os.cpu_count(), **_processor()}
    with contextlib.suppress(OSError, ValueError):
        facts["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)
    bios = sorted({value for text in _texts(_DRIVER.glob("gpus/*/information")) for value in _values(text, "Video BIOS")})
    if bios:
        facts["firmware.gpus"] = bios
    adapters = {path.parent.name: text.strip() for path, text in _texts_of(_INFINIBAND.glob("*/fw_ver"))}
    if adapters:
        facts["firmware.infiniband"] = adapters
    return facts


def host_key() -> str:
    """Return what tells this host from any other, also one of the same name: it is compared, not recorded."""
    boot = "".join(text for _, text in _texts_of([Path("/proc/sys/kernel/random/boot_id")]))
    return f"{socket.gethostname()} {boot.strip()}"


def library_facts() -> dict[str, Any]:
    """Return "library.NAME" of what torch computes with: versions, how torch was built, the instruction set that it uses."""
    gpu = torch.cuda.is_available()
    driver = [_first(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", text) for text in _texts([_DRIVER / "version"])]
    return {
        "library.python": platform.python_version(),
        "library.libc": " ".join(platform.libc_ver()),
        "library.torch_build": f"{torch.version.git_version} {_build_of_torch()}",
        "library.cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "library.cuda": torch.version.cuda,
        "library.driver": driver[0] if driver else None,
        "library.cudnn": torch.backends.cudnn.version() if gpu else None,
        "library.nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpu else None,
        "library.mkl": _first(r"oneAPI Math Kernel Library Version (\S+)", torch.__config__.show()),
        "library.onednn": _first(r"MKL-DNN v(\S+)", torch.__config__.show()),
        "library.openmp": _first(r"OpenMP (\d+)", torch.__config__.show()),
    }


def rank_facts(device: torch.device) -> dict[str, Any]:
    """Return what each rank has of its own: "threads.*", and the switches of torch, "torch.*"."""
    facts = {
        "threads.torch": torch.get_num_threads(),
        "threads.torch_between_operations": torch.get_num_interop_threads(),
        "threads.processors": len(os.sched_getaffinity(0)),
        "torch.deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch.float32_matmul_precision": torch.get_float32_matmul_precision(),
        "torch.default_dtype": str(torch.get_default_dtype()),
        "torch.flush_denormal": _flushes_denormals(),
    }
    if device.type == "cuda":
        matmul = torch.backends.cuda.matmul
        facts |= {
            "torch.cudnn_deterministic": torch.backends.cudnn.deterministic,
            "torch.cudnn_benchmark": torch.backends.cudnn.benchmark,
            "torch.tf32_matmul": matmul.allow_tf32,
            "torch.tf32_cudnn": torch.backends.cudnn.allow_tf32,
            "torch.bf16_reduced_sums": matmul.allow_bf16_reduced_precision_reduction,
            "torch.fp16_reduced_sums": matmul.allow_fp16_reduced_precision_reduction,
            "torch.sdp_flash": torch.backends.cuda.flash_sdp_enabled(),
            "torch.sdp_memory_efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
            "torch.sdp_cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        }
    return facts


def device_of(device: torch.device) -> tuple[str, str]:
    """Return (kind, serial) of a rank's GPU; "" where there is none."""
    if device.type != "cuda":
        return "", ""
    properties = torch.cuda.get_device_properties(device)
    return properties.name, str(getattr(properties, "uuid", ""))


def _processor() -> dict[str, Any]:
    text = "".join(_texts([Path("/proc/cpuinfo")]))
    name = _first(r"model name\s*:\s*(.+)", text) or platform.processor()
    return {"cpu": name, "microcode": _first(r"microcode\s*:\s*(\S+)", text)}


def _build_of_torch() -> str:
    """Return the hash of how torch was compiled, without what changes with this machine."""
    lines = [line for line in torch.__config__.show().splitlines() if "CPU capability" not in line]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _flushes_denormals() -> bool:
    return float(torch.tensor([1e-39]) * torch.tensor([1.0])) == 0.0


def _values(text: str, key: str) -> list[str]:
    return [line.partition(":")[2].strip() for line in text.splitlines() if line.partition(":")[0].strip() == key]


def _first(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match[1].strip() if match else None


def _texts(paths: Any) -> Iterator[str]:
    return (text for _, text in _texts_of(paths))


def _texts_of(paths: Any) -> Iterator[tuple[Path, str]]:
    for path in paths:
        with contextlib.suppress(OSError):
            yield path, path.read_text(errors="replace")
