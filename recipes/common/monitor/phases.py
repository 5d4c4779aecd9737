"""Reports the loop's current phase on every rank: to its heartbeat (where it is) and its timing file (where the time went)."""

from __future__ import annotations

import socket
from pathlib import Path

from recipes.common.engine.memory import memory_by_class
from recipes.common.engine.trainer import Trainer
from recipes.common.run_dir.heartbeat import Heartbeat
from recipes.common.run_dir.timing_files import TimingWriter
from recipes.common.runtime.step_clock import CLOCK, EVALUATE, HOST, OTHER, SAVE

_PARTS = {"step": OTHER, "log": HOST, "evaluate": EVALUATE, "save": SAVE}
_WITHOUT_SPANS = ("evaluate", "save")
MEMORY_STEP = 2  # of a start: the optimizer's states exist


class Phases:
    """One rank's phases (recipes.common.run_dir.heartbeat.PHASES). `start` it once the trainer is built, `enter` every phase."""

    def __init__(self, out_dir: Path, rank: int, trace_steps: range = range(0)) -> None:
        """trace_steps: steps of which every span is kept."""
        self._heartbeat = Heartbeat(out_dir, rank)
        self._out_dir, self._rank, self._trace_steps = out_dir, rank, trace_steps
        self._writer: TimingWriter | None = None
        self._trainer: Trainer | None = None
        self._steps = 0

    def start(self, trainer: Trainer) -> None:
        grid, stage = trainer.grid, trainer.stage
        self._trainer = trainer
        self._writer = TimingWriter(
            self._out_dir,
            self._rank,
            {
                "world": grid.pipeline * grid.data * grid.tensor,
                "pipeline": grid.pipeline,
                "data": grid.data,
                "tensor": grid.tensor,
                "context": grid.context,
                "expert": grid.expert,
                "schedule": stage.placement.schedule,
                "layers": [[chunk.start, chunk.stop] for chunk in stage.chunks],
                "host": socket.gethostname(),
                "device": grid.device.type,
            },
        )
        CLOCK.start(grid, grid.device, grid.timed_groups())

    def enter(self, step: int, phase: str) -> None:
        """Report that `phase` of `step` begins now."""
        self._heartbeat.enter(step, phase)
        if self._writer is None:
            return
        if phase in _PARTS:
            CLOCK.phase(_PARTS[phase], spans=phase not in _WITHOUT_SPANS)
            return
        CLOCK.end_step()
        self._write()
        if phase == "data":
            CLOCK.begin_step(step, keep_marks=step in self._trace_steps)
        elif phase == "end":
            CLOCK.settle(wait=True)
            self._write()
            self._writer.close()
            self._writer = None

    def add_memory(self, sizes: dict[str, int]) -> None:
        """Add bytes by class that something beside the loop has counted."""
        if sizes:
            self._writer.add({"memory": sizes})

    def _write(self) -> None:
        for times in CLOCK.taken():
            self._writer.step(times)
            self._steps += 1
            if self._steps == MEMORY_STEP:
                self._writer.add({"memory": memory_by_class(self._trainer)})
