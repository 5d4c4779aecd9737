"""Writes a checkpoint from whole tensors: the part that tools.from_hf and tools.from_deepspeed share.

The tensors lie whole in a few rank files (cut None), so any layout can load them. Sealed and published like any other.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else importing DeepSpeed looks for one, and warns on stdout
from recipes.common.checkpoint import publish_folder, sealed_checkpoints, step_folder
from recipes.common.checkpoint_files import Part, damage, merge_index, seal, write_rank_file
from recipes.common.run_files import write_json
from tools.console import CheckError, UsageError
from tools.hf_folder import tokenizer_files

FILE_BYTES = 1 << 30  # a file is written when this much is collected


def starting_state(*, tied: bool) -> dict[str, Any]:
    """state.json of step 0; what a later step has besides is for the caller to replace."""
    return {
        "step": 0,
        "consumed_seqs": 0,
        "skipped_steps": 0,
        "optimizer_steps": 0,
        "loss_scaler": {},
        "skip_list": [],
        "seed": None,
        "tied": tied,
        "world_size": 1,
    }


def refuse_used(out: Path) -> None:
    """Raises UsageError when `out` is a run already, or no folder at all."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give the folder of a new run")
    there = sealed_checkpoints(out)
    if there:
        raise UsageError(f"{out} is a run with {len(there)} checkpoints already; give the folder of a new run")


def write_checkpoint(
    out: Path,
    tensors: Iterable[tuple[str, str, np.ndarray]],
    state: dict[str, Any],
    config: PreTrainedConfig,
    tokenizer: Path | None,
) -> Path:
    """Write, seal, read again and publish OUT/checkpoints/step_N. Gives its folder.

    tensors: (name, kind, whole tensor) in any order, each pair once; about a gigabyte of them is in memory at a time.
    """
    folder = step_folder(out, state["step"])
    hidden = folder.with_name(f".{folder.name}.saving")
    shutil.rmtree(hidden, ignore_errors=True)  # of a conversion that was killed
    hidden.mkdir(parents=True)
    try:
        reports, parts = [], []
        for name, kind, data in tensors:
            flat = np.ascontiguousarray(data).reshape(-1)
            parts.append(Part(name, kind, data.shape, None, 0, 1, 0, flat.size, flat))
            if sum(part.data.nbytes for part in parts) >= FILE_BYTES:
                reports.append(write_rank_file(hidden, len(reports), parts))
                parts = []
        if parts or not reports:
            reports.append(write_rank_file(hidden, len(reports), parts))
        write_json(hidden / "index.json", merge_index(reports))
        write_json(hidden / "state.json", state | {"world_size": len(reports)})
        _write_model_folder(hidden / "model", config, tokenizer)
        seal(hidden, {report["file"]: report for report in reports})
        wrong = damage(hidden)
        if wrong:
            raise CheckError("the disk does not hold what was written: " + "; ".join(wrong))
        publish_folder(hidden, folder)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return folder


def _write_model_folder(folder: Path, config: PreTrainedConfig, tokenizer: Path | None) -> None:
    folder.mkdir()
    config.save_pretrained(folder)
    for path in tokenizer_files(tokenizer) if tokenizer else ():
        shutil.copyfile(path, folder / path.name)
