"""Saves a run beside training, from any layout.

A save copies this rank's partitions to host memory and returns; a thread writes them while training goes on, at most one save
at a time. The folder is written under another name, sealed when every rank's part is on disk, and renamed; then `latest` is
replaced. So a checkpoint that has its name is whole, whatever was killed when. Needs a file system that all ranks share.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from recipes.common.checkpoint.files import (
    Part,
    merge_index,
    publish_folder,
    seal,
    write_model_folder,
    write_rank_file,
)
from recipes.common.checkpoint.position import RunPosition
from recipes.common.config.json_files import read_json, write_json
from recipes.common.engine import zero_state
from recipes.common.engine.trainer import Trainer
from recipes.common.model.sharding import RankShard, rank_shard
from recipes.common.recipe import Recipe, due, from_root
from recipes.common.run_dir.checkpoint_folders import checkpoint_step, sealed_checkpoints, step_folder
from recipes.common.run_dir.run_files import recipe_to_dict
from recipes.common.run_dir.run_log import RunLog

_POLL_SECONDS = 0.02  # between the sealing thread's checks for the other ranks' reports


class Saver:
    """Saves one run's checkpoints. `save` and `finish` are collective: every rank calls them at the same step."""

    def __init__(self, out_dir: Path, trainer: Trainer, recipe: Recipe, log: RunLog | None) -> None:
        self.last_saved: Path | None = None
        self.stall_seconds = 0.0  # for which the last save blocked the loop
        self._report: dict[str, float] = {}
        self._out_dir, self._trainer, self._recipe, self._log = out_dir, trainer, recipe, log
        self._writing: _Save | None = None
        self._last_time = time.monotonic()
        self._host: dict[tuple[int, str], torch.Tensor] = {}
        if trainer.grid.rank == 0:
            for left in (out_dir / "checkpoints").glob(".*"):  # an interrupted save or deletion
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            (out_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        if dist.get_world_size() > 1:
            dist.barrier()

    def due(self, step: int) -> bool:
        return due(self._recipe.checkpoints.every_steps, step)

    def due_by_time(self) -> bool:
        """Whether a save is due by this rank's clock; the ranks agree through the step's votes."""
        minutes = self._recipe.checkpoints.every_minutes
        return minutes > 0 and time.monotonic() - self._last_time > 60 * minutes

    def save(self, position: RunPosition) -> None:
        started = time.perf_counter()
        self.finish()
        folder = step_folder(self._out_dir, position.step)
        state = {
            "step": position.step,
            "consumed_seqs": position.consumed_seqs,
            "skipped_steps": position.skipped_steps,
            "optimizer_steps": zero_state.optimizer_steps(self._trainer),
            "loss_scaler": zero_state.scaler_state(self._trainer),
            "skips": [list(skip) for skip in position.skips],
            "order": asdict(position.order),
            "seed": self._recipe.seed,
            "tied": self._trainer.stage.stack.tied,
            "world_size": dist.get_world_size(),
        }
        self._writing = _Save(folder, self._trainer.grid.rank, self._parts(), state, self._recipe)
        self._last_time = time.monotonic()
        self.stall_seconds = time.perf_counter() - started

    def finish(self) -> None:
        """Wait for the save in flight, if any; report it, and delete what the recipe does not keep."""
        if self._writing is None:
            return
        save, self._writing = self._writing, None
        error = save.wait_for_own_part()
        failed = torch.tensor([error is not None], dtype=torch.float32, device=self._trainer.grid.device)
        if dist.get_world_size() > 1:
            dist.all_reduce(failed)
        problem = save.end(abandon=bool(failed.item()))
        sealed = torch.tensor([problem is None], dtype=torch.float32, device=self._trainer.grid.device)
        if dist.get_world_size() > 1:
            dist.broadcast(sealed, src=0)  # rank 0 seals
        if sealed.item():
            self.last_saved = save.folder
        if self._log is None:
            return
        if sealed.item():
            self._report = {"save_seconds": save.seconds, "save_stall_seconds": self.stall_seconds}
            self._log.note(f"saved {save.folder} in {save.seconds:.1f} s ({self.stall_seconds:.2f} s blocking)")
            self._delete_old()
        else:
            reason = error or problem or "another rank could not write its part; see its output"
            self._log.note(f"saving {save.folder} failed: {reason}; training continues, the previous checkpoint is kept")

    def report(self) -> dict[str, float]:
        """Return, once after each save, its seconds for metrics.jsonl: total, and blocking."""
        report, self._report = self._report, {}
        return report

    def _parts(self) -> list[Part]:
        """Copy this rank's state to host memory (the buffers are kept for the next save)."""
        stage, grid = self._trainer.stage, self._trainer.grid
        shapes = stage.whole_shapes
        tied_copy = f"{stage.stack.embedding}.weight" if stage.stack.tied and not stage.is_first else None
        parts = []
        for index, partition in enumerate(zero_state.partitions(self._trainer)):
            host = {kind: self._to_host((index, kind), flat) for kind, flat in partition.states.items()}
            for f in partition.fragments:
                shard = rank_shard(stage.tensor_plan.shards.get(f.name), grid.tensor_rank, grid.tensor)
                stop = min(f.stop, shard.stored_elements(shapes[f.name]))
                if f.name == tied_copy or shard.rank != grid.tensor_rank or f.start >= stop:  # another rank saves it; padding
                    continue
                for kind, flat in host.items():
                    data = flat[f.offset : f.offset + stop - f.start]
                    parts.append(Part(f.name, kind, shapes[f.name], shard, f.start, stop, data))
        if grid.data_rank == 0 and grid.tensor_rank == 0:
            for name, buffer in stage.persistent_buffers():
                data = buffer.detach().cpu().numpy().reshape(-1)
                parts.append(Part(name, "buffer", tuple(buffer.shape), RankShard(), 0, data.size, data))
        if grid.device.type == "cuda":
            torch.cuda.synchronize()
        return parts

    def _to_host(self, key: tuple[int, str], flat: torch.Tensor) -> np.ndarray:
        if key not in self._host:
            self._host[key] = torch.empty(flat.shape, dtype=torch.float32, pin_memory=flat.device.type == "cuda")
        return self._host[key].copy_(flat, non_blocking=True).numpy()

    def _delete_old(self) -> None:
        rules = self._recipe.checkpoints
        for folder in sealed_checkpoints(self._out_dir)[: -rules.keep_last]:
            if rules.keep_every_steps and checkpoint_step(folder) % rules.keep_every_steps == 0:
                continue
            hidden = folder.with_name(f".{folder.name}.deleting")  # never half there under its name
            os.replace(folder, hidden)
            shutil.rmtree(hidden)


class _Save:
    """One save in flight: a thread writes this rank's part, and on rank 0 another seals when all parts are on disk."""

    def __init__(self, folder: Path, rank: int, parts: list[Part], state: dict[str, Any], recipe: Recipe) -> None:
        self.folder, self.seconds = folder, 0.0
        self._hidden = folder.with_name(f".{folder.name}.saving")
        self._rank, self._parts, self._state, self._recipe = rank, parts, state, recipe
        self._error: str | None = None
        self._seal_error: str | None = None
        self._abandon = threading.Event()
        self._started = time.perf_counter()
        self._writer = threading.Thread(target=self._write, name="checkpoint writer", daemon=True)
        self._sealer = threading.Thread(target=self._seal_when_whole, name="checkpoint sealer", daemon=True)
        self._writer.start()
        if rank == 0:
            self._sealer.start()

    def wait_for_own_part(self) -> str | None:
        self._writer.join()
        return self._error

    def end(self, *, abandon: bool) -> str | None:
        """Wait for the seal, or abandon it. On rank 0, return None when the checkpoint is sealed, else what went wrong."""
        if abandon:
            self._abandon.set()
        if self._rank != 0:
            return None
        self._sealer.join()
        if self._hidden.exists():
            shutil.rmtree(self._hidden, ignore_errors=True)
        return self._seal_error or ("abandoned" if abandon else None)

    def _write(self) -> None:
        try:
            self._hidden.mkdir(parents=True, exist_ok=True)
            report = write_rank_file(self._hidden, self._rank, self._parts)
            write_json(self._report(self._rank), report)
        except OSError as error:
            self._error = f"rank {self._rank}: {error}"
        finally:
            self._parts = []

    def _report(self, rank: int) -> Path:
        return self._hidden / f".rank_{rank:05d}.json"

    def _seal_when_whole(self) -> None:
        try:
            missing = set(range(self._state["world_size"]))
            while missing:
                if self._abandon.wait(_POLL_SECONDS):
                    return
                missing = {rank for rank in missing if not self._report(rank).exists()}
            self._seal()
        except OSError as error:
            self._seal_error = str(error)
        self.seconds = time.perf_counter() - self._started

    def _seal(self) -> None:
        reports = [read_json(self._report(rank)) for rank in range(self._state["world_size"])]
        write_json(self._hidden / "index.json", merge_index(reports))
        write_json(self._hidden / "state.json", self._state)
        write_json(self._hidden / "recipe.json", recipe_to_dict(self._recipe))
        write_model_folder(self._hidden / "model", self._recipe.model, from_root(self._recipe.tokenizer))
        for rank in range(len(reports)):
            self._report(rank).unlink()
        seal(self._hidden, {report["file"]: report for report in reports})
        publish_folder(self._hidden, self.folder)
