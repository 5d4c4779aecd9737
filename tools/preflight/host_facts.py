"""Gathers the facts of one host: code, packages, recipe, data, limits, and its GPUs by nvidia-smi and the kernel's log.

Only a host's first rank runs it and pays for importing transformers and DeepSpeed. Nothing is judged here.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.common.recipe import ROOT, Blend, Recipe
from recipes.common.record.packages import package_versions
from recipes.common.record.source_code import git_state
from recipes.common.run_dir.run_files import recipe_to_dict
from recipes.common.runtime.gpus import unused_gpus
from tools.common.recipe_io import load_recipe

SOURCES = ("recipes", "ds_configs", "tools", "launch")  # the code of a run and of its launch
SHM = Path("/dev/shm")
XID_SECONDS = 24 * 3600  # older ones belong to earlier jobs
STAMP = re.compile(r"\[?\s*(\d+\.\d+)")  # of journalctl and dmesg
HEALTH = {  # nvidia-smi's field -> what a value over 0 (or "Yes") means
    "ecc.errors.uncorrected.volatile.total": "uncorrected ECC errors since the driver started",
    "retired_pages.pending": "memory pages that wait for a reset to be retired",
    "remapped_rows.pending": "memory rows that wait for a reset to be remapped",
    "remapped_rows.failure": "memory rows that cannot be remapped any more",
}


def host_facts(recipe_path: str, host: tuple[int, int], seconds: float) -> dict[str, Any]:
    """Return every fact of this host, as JSON types. host: (index, number of hosts), so that hosts sample different shards."""
    facts: dict[str, Any] = {
        "code": {"commit": git_state()["commit"], "files": source_hashes(ROOT)},
        "versions": {"python": platform.python_version(), **package_versions(), **_built_with()},
        "limits": limits(),
        "address": _own_address(),
        "gloo_interface": os.environ.get("GLOO_SOCKET_IFNAME"),
        "environment": environment_of_interest(os.environ),
        "nvidia": nvidia_facts(),
    }
    try:
        recipe, device = _load(recipe_path)
    except Exception as error:  # an import may fail on this host alone: that is a finding
        return facts | {"recipe_error": f"{type(error).__name__}: {error}"}
    return facts | {
        "device": device,
        "unused_gpus": unused_gpus(device, os.environ),
        "recipe_hash": recipe_hash(recipe),
        "data": data_facts(recipe, host, seconds),
    }


def _load(recipe_path: str) -> tuple[Recipe, str]:
    from deepspeed.accelerator import get_accelerator  # here, not above: it takes seconds, which the other ranks save

    return load_recipe(recipe_path), get_accelerator().device_name()


def recipe_hash(recipe: Recipe) -> str:
    """Hash the resolved recipe, which also shows other defaults of another transformers."""
    text = json.dumps(recipe_to_dict(recipe), sort_keys=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def source_hashes(root: Path) -> dict[str, str]:
    """Return {path from the root: start of its sha256} for all code, committed or not: it is what runs."""
    found = {}
    for folder in SOURCES:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".json", ".sh", ".sbatch") and path.is_file():
                found[str(path.relative_to(root))] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    requirements = root / "requirements.txt"
    if requirements.is_file():
        found["requirements.txt"] = hashlib.sha256(requirements.read_bytes()).hexdigest()[:16]
    return found


def _built_with() -> dict[str, str | None]:
    import torch

    nccl = None
    if torch.cuda.is_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {"CUDA of torch": torch.version.cuda, "NCCL": nccl}


def limits() -> dict[str, Any]:
    """Return limits: open files, locked memory (bytes, -1: none), free shared memory (bytes, None where there is no /dev/shm)."""
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return {
        "open_files": files if files != resource.RLIM_INFINITY else 1 << 40,
        "open_files_hard": hard if hard != resource.RLIM_INFINITY else 1 << 40,
        "locked_bytes": -1 if locked == resource.RLIM_INFINITY else locked,
        "shm_free_bytes": shutil.disk_usage(SHM).free if SHM.is_dir() else None,
        "infiniband": Path("/sys/class/infiniband").is_dir() and any(Path("/sys/class/infiniband").iterdir()),
    }


def _own_address() -> str | None:
    """Return what this host's name resolves to: gloo binds to it unless GLOO_SOCKET_IFNAME is set."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def data_facts(recipe: Recipe, host: tuple[int, int], seconds: float) -> dict[str, Any]:
    """Return what training would find wrong with the data, each folder's identity, and the sampled shards."""
    from recipes.common.data.batches import recipe_data_problems
    from recipes.common.data.blend import folders
    from recipes.common.data.shards import data_identity
    from recipes.common.recipe import from_root
    from tools.preflight.storage import sample_shards

    problems = recipe_data_problems(
        recipe.data,
        seq_len=recipe.batch.seq_len,
        vocab_size=recipe.model.get_text_config().vocab_size,
        tokenizer=from_root(recipe.tokenizer),
        needs_validation=recipe.evaluation.every_steps > 0,
        validation_seqs=recipe.evaluation.seqs,
    )
    names = folders(recipe.data) if isinstance(recipe.data, Blend) else [recipe.data]
    whole = {name: from_root(name) for name in names if (from_root(name) / "dataset.json").is_file()}
    sampled, bad = sample_shards(list(whole.values()), host, seconds) if not problems else (0, [])
    return {
        "problems": problems,
        "identity": {name: data_identity(path) for name, path in whole.items()},
        "sampled_shards": sampled,
        "bad_shards": bad,
    }


def nvidia_facts() -> dict[str, Any] | None:
    """Return {"gpus": {uuid: facts}, "busy": {uuid: [pid, ...]}, "xid": lines or None, ...} by nvidia-smi; None without it."""
    base = ("uuid", "name", "driver_version", "memory.used", "memory.total")
    rows = _query("--query-gpu=" + ",".join(base))
    if rows is None:
        return None
    health = _query("--query-gpu=" + ",".join(("uuid", *HEALTH)))  # separate: an older driver does not know every field
    apps = _query("--query-compute-apps=gpu_uuid,pid") or []
    return parse_gpus(rows, health) | {"busy": parse_apps(apps), "xid": _xid_lines()}


def parse_gpus(rows: list[list[str]], health: list[list[str]] | None) -> dict[str, Any]:
    """Parse nvidia-smi's CSV without header and units; memory is in MiB."""
    gpus: dict[str, dict[str, Any]] = {}
    for uuid, name, driver, used, total in rows:
        gpus[uuid] = {"name": name, "driver": driver, "used_mib": _count(used), "total_mib": _count(total), "faults": []}
    for uuid, *values in health or []:
        for (field, words), value in zip(HEALTH.items(), values, strict=True):
            if value == "Yes" or (_count(value) or 0) > 0:
                gpus[uuid]["faults"].append(f"{words} ({field}: {value})")
    return {"gpus": gpus, "health_read": health is not None}


def parse_apps(rows: list[list[str]]) -> dict[str, list[int]]:
    busy: dict[str, list[int]] = {}
    for uuid, pid in rows:
        busy.setdefault(uuid, []).append(int(pid))
    return busy


def parse_xid(kernel_log: str, now: float) -> list[str]:
    """Return the last day's lines such as "[ 5123.456789] NVRM: Xid (PCI:0000:3b:00): 79, ..."; stamps and `now` in seconds."""
    recent = []
    for line in kernel_log.splitlines():
        stamp = STAMP.match(line)
        if "NVRM: Xid" in line and not (stamp and now - float(stamp[1]) > XID_SECONDS):
            recent.append(line[line.index("NVRM: Xid") :])
    return recent


def _xid_lines() -> list[str] | None:
    """Return Xid errors; None where the kernel's log cannot be read."""
    text = _output("journalctl", "-k", "-o", "short-unix", "--no-pager", "--since", "-24h")
    if text and STAMP.match(text):
        return parse_xid(text, time.time())
    text = _output("dmesg")
    return parse_xid(text, time.clock_gettime(time.CLOCK_BOOTTIME)) if text else None


def _query(what: str) -> list[list[str]] | None:
    text = _output("nvidia-smi", what, "--format=csv,noheader,nounits")
    return None if text is None else [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def _count(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def environment_of_interest(environment: Mapping[str, str]) -> dict[str, str]:
    """Return variables that must be equal on every host, or collectives hang or differ: NCCL's and those of numerics."""
    chosen = ("NCCL_", "TORCH_NCCL_", "CUDA_DEVICE_MAX_CONNECTIONS", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE")
    by_host = ("NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_HOSTID", "NCCL_TOPO_FILE")  # may differ
    return {name: value for name, value in sorted(environment.items()) if name.startswith(chosen) and name not in by_host}
