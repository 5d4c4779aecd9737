"""Writes a step's numbers to metrics.jsonl, the progress on stderr, W&B and TensorBoard. Rank 0 only."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.common.run_dir.metrics import MetricsWriter, Note, Value, one_line
from recipes.common.run_dir.progress import StepProgress


class RunLog:
    """The open sinks of one run. Call `write` once a step, `note` for a line in between, `close` at the end.

    Missing or failing W&B and TensorBoard cost one line on stderr, never the run.
    """

    def __init__(
        self,
        out_dir: Path,
        *,
        name: str,
        run_steps: int,
        resumed_step: int | None = None,
        config: Mapping[str, Any] | None = None,
        run_id: str | None = None,
    ) -> None:
        """Move aside what an earlier process wrote after `resumed_step` (None: a fresh start, so all of it).

        config: shown by W&B. run_id: equal over resumes (that of run.json).
        """
        first_step = resumed_step or 0
        self._out_dir = out_dir
        self._progress = StepProgress(run_steps, first_step, sys.stderr)
        self._metrics = MetricsWriter(out_dir, resumed_step, self.note)
        self._wandb = start_wandb(out_dir, name, config or {}, run_id, self.note)
        self._tensorboard = start_tensorboard(out_dir, first_step, self.note)

    def write(self, record: Mapping[str, Value]) -> None:
        """Append one step to every sink. `record` needs "step"."""
        self._metrics.append(record)
        if self._wandb is not None:
            try:
                self._wandb.log(dict(record))
            except Exception as error:  # a sink that shows numbers must not end the run
                self._wandb = None
                self.note(f"W&B is off from step {record['step']}: {one_line(error)}")
        if self._tensorboard is not None:
            try:
                for key, value in record.items():
                    if key != "step" and isinstance(value, int | float):
                        self._tensorboard.add_scalar(key, value, record["step"])
            except Exception as error:  # as above: a full disk, a removed folder
                self._tensorboard = None
                self.note(f"TensorBoard is off from step {record['step']}: {one_line(error)}")
        self._progress.show(record)

    def rewind(self, step: int) -> None:
        """Move aside what was written after `step`, and show the steps after it anew."""
        self._progress.rewind(step)
        self._metrics.rewind(step)
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = start_tensorboard(self._out_dir, step, self.note)

    def note(self, text: str) -> None:
        """Print a line for people on stderr (a checkpoint, an evaluation) without breaking the bar."""
        self._progress.note(text)

    def close(self) -> None:
        self._metrics.close()
        self._progress.close()
        if self._wandb is not None:
            try:
                self._wandb.finish()
            except Exception as error:  # as in write
                self.note(f"W&B did not finish: {one_line(error)}")
        if self._tensorboard is not None:
            self._tensorboard.close()


def start_wandb(out_dir: Path, name: str, config: Mapping[str, Any], run_id: str | None, note: Note) -> Any:
    """Open a W&B run: online where the user is logged in, else offline. W&B's own variables (WANDB_MODE) hold."""
    try:
        import wandb

        mode = wandb.setup().settings.mode
        if mode == "online" and not _wandb_login(wandb, note):
            mode = "offline"
        run = wandb.init(
            project="trifold",
            name=name,
            id=run_id,
            resume="allow" if run_id and mode == "online" else None,  # offline runs are joined by their id when synced
            dir=out_dir,
            mode=mode,
            config=dict(config),
            # console: W&B would otherwise redirect stderr, which the progress bar needs as a terminal
            settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True),
        )
        run.define_metric("*", step_metric="step")
    except Exception as error:  # missing, broken, refused by its server: the numbers are in metrics.jsonl anyway
        note(f"W&B is off: {one_line(error)}")
        return None
    return run


def _wandb_login(wandb: Any, note: Note) -> bool:
    """Whether the user has credentials that work. Without any, nothing is asked and no network is used."""
    try:
        return bool(wandb.login(prompt=False))
    except Exception as error:
        note(f"W&B is offline: {one_line(error)}")
        return False


def start_tensorboard(out_dir: Path, first_step: int, note: Note) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step: hides what an earlier process wrote after the checkpoint that is resumed
        return SummaryWriter(out_dir / "tensorboard", purge_step=first_step + 1 if first_step else None, flush_secs=30)
    except Exception as error:  # missing or broken
        note(f"TensorBoard is off: {one_line(error)}")
        return None
