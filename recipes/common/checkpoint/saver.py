"""Saves a run beside training, from any layout.

A save copies this rank's partitions to host memory and returns; a thread writes them while training goes on, at most one save
at a time. The folder is written under another name, sealed when every rank's part is on disk, and renamed; then `latest` is
replaced. So a checkpoint that has its name is whole, whatever was killed when. Needs a file system that all ranks share.

A save that fails costs that save: one rank's error, of any kind, reaches all ranks with the next step's votes. The last save of a
start is tried again while it fails, and a run whose last state did not reach the disk ends with an error of its own.
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from recipes.common.checkpoint.files import CheckpointError, Part, read_seal
from recipes.common.checkpoint.folders import clear_interrupted, delete_checkpoint
from recipes.common.checkpoint.position import RunPosition
from recipes.common.checkpoint.save_in_flight import SaveInFlight
from recipes.common.engine import zero_state
from recipes.common.engine.trainer import Trainer
from recipes.common.model.sharding import RankShard
from recipes.common.recipe import Recipe, due
from recipes.common.run_dir.checkpoint_folders import checkpoint_step, sealed_checkpoints, step_folder
from recipes.common.run_dir.lease import Lease
from recipes.common.run_dir.metrics import one_line
from recipes.common.run_dir.run_log import RunLog
from recipes.common.runtime.exits import UnsavedError

STOP_PATIENCE_SECONDS = 30.0  # for the last save of a run that was asked to stop: schedulers kill it soon after
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 1.0, 10.0  # before the last save is tried again; the wait doubles
_REASON_BYTES = 512  # of an error that one rank tells the others


class Saver:
    """Saves one run's checkpoints. `save`, `finish` and `finish_last` are collective: every rank calls them at the same step."""

    def __init__(
        self,
        out_dir: Path,
        trainer: Trainer,
        recipe: Recipe,
        log: RunLog | None,
        resumed_step: int | None = None,
        lease: Lease | None = None,
    ) -> None:
        """resumed_step: of the checkpoint that this start was loaded from. lease: on rank 0, of the run directory."""
        self.last_saved = None if resumed_step is None else step_folder(out_dir, resumed_step)
        self.stall_seconds = 0.0  # for which the last save blocked the loop
        self._report: dict[str, float] = {}
        self._out_dir, self._trainer, self._recipe, self._log = out_dir, trainer, recipe, log
        self._writing: SaveInFlight | None = None
        self._number = 0  # of saves so far
        self._failure: str | None = None  # of the last save; the same on every rank
        self._told: set[str] = set()  # remarks that were printed
        self._last_time = time.monotonic()
        self._host: dict[tuple[int, str], torch.Tensor] = {}
        self._lease = lease
        if trainer.grid.rank == 0:
            (out_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
            self._remark(clear_interrupted(out_dir / "checkpoints"))
        # also lets the other ranks wait until the folder is ready
        self._token = self._told_by(0, lease.token if lease is not None else f"0-{secrets.token_hex(6)}")

    def due(self, step: int) -> bool:
        return due(self._recipe.checkpoints.every_steps, step)

    def due_by_time(self) -> bool:
        """Whether a save is due by this rank's clock; the ranks agree through the step's votes."""
        minutes = self._recipe.checkpoints.every_minutes
        return minutes > 0 and time.monotonic() - self._last_time > 60 * minutes

    def failed(self) -> bool:
        """Whether the save in flight has failed on this rank; the ranks agree through the step's votes.

        Raises LeaseLostError, on rank 0, once another job has taken the run directory over.
        """
        if self._lease is not None:
            self._lease.check()
        return self._writing is not None and self._writing.failed()

    def give_up(self, failed: bool) -> None:
        """End a save that the ranks know to have failed, as a vote told them."""
        if failed:
            self.finish()

    def save(self, position: RunPosition) -> None:
        started = time.perf_counter()
        self.finish()
        self._number += 1
        folder, rank = step_folder(self._out_dir, position.step), self._trainer.grid.rank
        hidden = folder.with_name(f".{folder.name}.{self._token}.{self._number}.saving")
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
        self._writing = SaveInFlight(folder, hidden, rank, state, self._recipe, self._parts, self._token, self._confirm)
        self._last_time = time.monotonic()
        self.stall_seconds = time.perf_counter() - started

    def finish(self) -> None:
        """Wait for the save in flight, if any; report it, and delete what the recipe does not keep."""
        if self._writing is None:
            return
        save, self._writing = self._writing, None
        reason = self._of_first_failed_rank(save.wait_for_own_part())
        problem = save.end(abandon=reason is not None)
        self._failure = reason or self._told_by(0, problem)  # rank 0 seals
        if self._failure is None:
            self.last_saved = save.folder
        if self._log is None:
            return
        if self._failure is None:
            self._report = {"save_seconds": save.seconds, "save_stall_seconds": self.stall_seconds}
            self._log.note(f"saved {save.folder} in {save.seconds:.1f} s ({self.stall_seconds:.2f} s blocking)")
            self._remark(save.remarks)
            self._delete_old(checkpoint_step(save.folder))
        else:
            self._log.note(f"saving {save.folder} failed: {self._failure}; earlier checkpoints are as they were")

    def finish_last(self, position: RunPosition, stopping: Callable[[], bool], show_life: Callable[[], None]) -> None:
        """Wait until the state at `position` is on disk, and save it again while that fails.

        stopping: whether this rank was asked to stop; then for STOP_PATIENCE_SECONDS at most, else for the recipe's
        checkpoints.last_save_minutes. show_life: called before each try. Raises UnsavedError, on all ranks, when patience ends.
        """
        started, wait, tries = time.monotonic(), _FIRST_WAIT_SECONDS, 1
        patience = 60 * self._recipe.checkpoints.last_save_minutes
        while True:
            self.finish()
            if self._lease is not None:
                self._lease.check()
            if self._is_on_disk(position.step):
                return
            waited = time.monotonic() - started
            too_long = waited > patience, waited > min(patience, STOP_PATIENCE_SECONDS)
            # rank 0's clock decides for all
            gives_up, would_stop, stop = self._any_rank(*(late and self._trainer.grid.rank == 0 for late in too_long), stopping())
            if gives_up or (would_stop and stop):
                raise UnsavedError(self._unsaved(position.step, tries, waited))
            if self._log is not None and tries == 1:
                longest = min(patience, STOP_PATIENCE_SECONDS) if stop else patience
                self._log.note(f"the last state, of step {position.step}, is not on disk: trying again for {longest:.0f} s")
            time.sleep(wait)
            wait, tries = min(2 * wait, _LONGEST_WAIT_SECONDS), tries + 1
            show_life()
            self.save(position)

    def _confirm(self) -> None:
        if self._lease is not None:
            self._lease.confirm()

    def _is_on_disk(self, step: int) -> bool:
        """Whether the checkpoint of `step` was saved or loaded by this start, and rank 0 still sees its files."""
        missing = False
        if self._trainer.grid.rank == 0 and self.last_saved == step_folder(self._out_dir, step):
            try:
                files = read_seal(self.last_saved)["files"]
                changed = [n for n, entry in files.items() if (self.last_saved / n).stat().st_size != entry["bytes"]]
                if changed:
                    self._failure, missing = f"{changed[0]} of another size than was written", True
            except (OSError, CheckpointError) as error:
                self._failure, missing = one_line(error), True
        return self.last_saved == step_folder(self._out_dir, step) and not self._any_rank(missing)[0]

    def _unsaved(self, step: int, tries: int, seconds: float) -> str:
        newest = f"the newest checkpoint is {self.last_saved}" if self.last_saved else "this start saved no checkpoint"
        return (
            f"the last state, of step {step}, is not on disk: {tries} saves failed in {seconds:.0f} s, the last one with "
            f"{self._failure}; {newest}. Correct that (a full disk, permissions, a mount), then continue with --resume"
        )

    def _any_rank(self, *votes: bool) -> tuple[bool, ...]:
        counted = torch.tensor(votes, dtype=torch.float32, device=self._trainer.grid.device)
        if dist.get_world_size() > 1:
            dist.all_reduce(counted)
        return tuple(count > 0 for count in counted.tolist())

    def _of_first_failed_rank(self, error: str | None) -> str | None:
        """Return the error of the lowest rank that has one."""
        world, rank = dist.get_world_size(), self._trainer.grid.rank
        first = torch.tensor([world if error is None else rank], dtype=torch.float32, device=self._trainer.grid.device)
        if world > 1:
            dist.all_reduce(first, op=dist.ReduceOp.MIN)
        return None if first.item() == world else self._told_by(int(first.item()), error)

    def _told_by(self, rank: int, text: str | None) -> str | None:
        """Return a text of one rank on all; None stays None."""
        raw = (text or "").encode(errors="replace")[:_REASON_BYTES].ljust(_REASON_BYTES, b"\0")
        told = torch.tensor(list(raw), dtype=torch.uint8, device=self._trainer.grid.device)
        if dist.get_world_size() > 1:
            dist.broadcast(told, src=rank)
        return bytes(told.tolist()).rstrip(b"\0").decode(errors="replace") or None

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
                held = stage.held.of(f.name)
                shard, before = held.shard, held.start(shapes[f.name])
                start, stop = before + f.start, min(before + f.stop, shard.stored_elements(shapes[f.name]))
                if f.name == tied_copy or shard.rank != grid.tensor_rank or start >= stop:  # another rank saves it; padding
                    continue
                for kind, flat in host.items():
                    data = flat[f.offset : f.offset + stop - start]
                    parts.append(Part(f.name, kind, shapes[f.name], shard, start, stop, data))
        if grid.data_rank == 0 and grid.tensor_rank == 0:
            for name, buffer in stage.persistent_buffers():
                data = buffer.detach().to("cpu", copy=True).numpy().reshape(-1)  # training moves a router's bias
                parts.append(Part(name, "buffer", tuple(buffer.shape), RankShard(), 0, data.size, data))
        if grid.device.type == "cuda":
            torch.cuda.synchronize()
        return parts

    def _to_host(self, key: tuple[int, str], flat: torch.Tensor) -> np.ndarray:
        if key not in self._host:
            self._host[key] = torch.empty(flat.shape, dtype=torch.float32, pin_memory=flat.device.type == "cuda")
        return self._host[key].copy_(flat, non_blocking=True).numpy()

    def _delete_old(self, step: int) -> None:
        """Delete what the recipe does not keep of the checkpoints up to `step`: later ones were passed over and do not count."""
        rules = self._recipe.checkpoints
        saved = [folder for folder in sealed_checkpoints(self._out_dir) if checkpoint_step(folder) <= step]
        for folder in saved[: -rules.keep_last]:
            if rules.keep_every_steps and checkpoint_step(folder) % rules.keep_every_steps == 0:
                continue
            self._remark(delete_checkpoint(folder))

    def _remark(self, remarks: list[str]) -> None:
        """Print each remark once."""
        for remark in remarks:
            if remark not in self._told:
                self._told.add(remark)
                if self._log is not None:
                    self._log.note(remark)
                else:
                    print(remark, file=sys.stderr, flush=True)
