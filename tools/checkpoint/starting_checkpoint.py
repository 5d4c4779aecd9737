"""Writes a checkpoint that no run saved, for from-hf and from-deepspeed. Any layout can load it."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else importing DeepSpeed looks for one, and warns on stdout
from recipes.common.checkpoint.files import (
    Part,
    damage,
    merge_index,
    seal,
    write_rank_file,
)
from recipes.common.checkpoint.folders import publish_folder
from recipes.common.checkpoint.reader import Reader
from recipes.common.config.json_files import read_json, write_json
from recipes.common.model.sharding import RankShard
from recipes.common.run_dir.checkpoint_folders import holder, sealed_checkpoints, step_folder
from recipes.common.run_dir.lease import FOLDER, Lease, held
from tools.checkpoint.contents import gaps
from tools.checkpoint.hf_folder import readable_tokenizer_files
from tools.common.console import CheckError, UsageError
from tools.common.hf_config import first_line

_GENERATION = "generation_config.json"
FILE_BYTES = 1 << 30  # a file is written when this much is collected


def starting_state(*, tied: bool) -> dict[str, Any]:
    """Return the state.json of step 0; the caller updates it for a later step."""
    return {
        "step": 0,
        "consumed_seqs": 0,
        "skipped_steps": 0,
        "optimizer_steps": 0,
        "loss_scaler": {},
        "skips": [],
        "seed": None,
        "tied": tied,
        "world_size": 1,
    }


def refuse_used(out: Path) -> None:
    """Raise UsageError when `out` is already a run, or is a file."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give the folder of a new run")
    if (kept := holder(out)) is not None:
        raise UsageError(f"{out} lies in {kept}, where nothing but checkpoints may be; give a folder outside")
    there = sealed_checkpoints(out)
    if there:
        raise UsageError(f"{out} is already a run, with {len(there)} checkpoints; give the folder of a new run")


def usable_tokenizer(model_folder: Path, given: Path | None, config: PreTrainedConfig) -> Path:
    """Return the folder whose tokenizer is kept. Raises UsageError for a given one that has none, or that cannot be read."""
    folder = model_folder if given is None else given
    kept = readable_tokenizer_files(folder)
    if not kept and given is not None:
        raise UsageError(f"--tokenizer={folder}: no tokenizer files there")
    _refuse_unreadable(kept, folder, config)
    return folder


def _refuse_unreadable(kept: list[Path], folder: Path, config: PreTrainedConfig) -> None:
    """Raise UsageError for a tokenizer or generation_config.json that no exported model could be used with."""
    names = {path.name for path in kept}
    try:
        if _GENERATION in names:
            what, cure = _GENERATION, "mend it, or take it out"
            GenerationConfig.from_dict(read_json(folder / _GENERATION))
        if names - {_GENERATION}:
            what, cure = "its tokenizer", "mend it, or give another with --tokenizer"
            AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever their own code raises
        raise UsageError(f"{folder}: transformers cannot read {what}: {first_line(error)}; {cure}") from error


def whole_part(name: str, kind: str, tensor: np.ndarray) -> Part:
    flat = np.ascontiguousarray(tensor).reshape(-1)
    return Part(name, kind, tensor.shape, RankShard(), 0, flat.size, flat)


@dataclass(frozen=True)
class LateArray:
    """A flat array that is read when it is written, so that one tensor at a time is in memory."""

    size: int
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.ascontiguousarray(self.read()).reshape(-1)


def late_part(name: str, kind: str, shape: tuple[int, ...], dtype: torch.dtype, read: Callable[[], np.ndarray]) -> Part:
    """Return a part whose data `read` returns when it is written."""
    numbers = torch.empty(0, dtype=dtype).numpy().dtype
    size = math.prod(shape)
    return Part(name, kind, shape, RankShard(), 0, size, LateArray(size, numbers, read))


def collected(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Group parts by the gigabyte, for one file each."""
    batch: list[Part] = []
    for part in parts:
        batch.append(part)
        if sum(p.data.nbytes for p in batch) >= FILE_BYTES:
            yield batch
            batch = []
    yield batch


def write_checkpoint(
    out: Path, files: Iterable[list[Part]], state: dict[str, Any], config: PreTrainedConfig, tokenizer: Path | None
) -> Path:
    """Write, seal, read back and publish OUT/checkpoints/step_N, and return its folder.

    files: the parts of each rank file, one file in memory at a time; a (name, kind) comes once in a file. `state` is read after
    the last one. Raises CheckError when the disk returns something else, or elements of a tensor are missing.
    """
    with held(out, out / FOLDER, "job", "a conversion") as lease:
        refuse_used(out)
        return _write_checkpoint(out, files, state, config, tokenizer, lease)


def _write_checkpoint(
    out: Path, files: Iterable[list[Part]], state: dict[str, Any], config: PreTrainedConfig, tokenizer: Path | None, lease: Lease
) -> Path:
    folder = step_folder(out, state["step"])
    hidden = folder.with_name(f".{folder.name}.{lease.token}.saving")
    for left in out.glob("checkpoints/.step_*.saving"):  # by a conversion that was killed
        shutil.rmtree(left, ignore_errors=True)
    hidden.mkdir(parents=True)
    try:
        reports = []
        for parts in files:
            if parts:
                reports.append(write_rank_file(hidden, len(reports), parts, lease.token))
        write_json(hidden / "index.json", merge_index(reports))
        write_json(hidden / "state.json", state | {"world_size": len(reports)})
        _write_model_folder(hidden / "model", config, tokenizer)
        seal(hidden, {report["file"]: report for report in reports}, lease.token)
        wrong = damage(hidden) or gaps(Reader(hidden))
        if wrong:
            raise CheckError("the checkpoint was not written whole: " + "; ".join(wrong[:5]))
        lease.confirm()
        publish_folder(hidden, folder)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        with contextlib.suppress(OSError):  # it holds something; a failed conversion leaves nothing behind
            folder.parent.rmdir()
    return folder


def _write_model_folder(folder: Path, config: PreTrainedConfig, tokenizer: Path | None) -> None:
    folder.mkdir()
    config.save_pretrained(folder)
    for path in readable_tokenizer_files(tokenizer) if tokenizer else ():
        shutil.copyfile(path, folder / path.name)
