"""Runs the monitor for the loop: before each step, after it, at the end. `Recipe.monitor` says what is measured when.

It never ends a run, but for copies that differ, where the recipe says so. A part that raises is told once, and off from then on,
on all ranks alike: a rank that left out a collective would leave the others waiting.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipes.common.engine.trainer import NONFINITE, StepResult, Trainer
from recipes.common.monitor.nonfinite import NonFinite, find_nonfinite
from recipes.common.monitor.parameter_stats import STATS, ParameterStats
from recipes.common.monitor.replica_drift import find_drift
from recipes.common.monitor.router_stats import expert_names, expert_values, router_fields, router_values
from recipes.common.recipe import Recipe, due
from recipes.common.run_dir.run_log import RunLog
from recipes.common.run_dir.tensor_stats import ACTIVATIONS, EXPERTS, PARAMETERS, ROUTERS, StatsWriter
from recipes.common.runtime.exits import TrainingError

DRIFT = "the comparison of copies"


class RunMonitor:
    """One run's monitor. Every rank has one, and all get the same numbers; rank 0's also writes `tensor_stats/`."""

    def __init__(
        self, trainer: Trainer, recipe: Recipe, out_dir: Path, *, resumed_step: int | None = None, log: RunLog | None = None
    ) -> None:
        """resumed_step, log: as RunLog's; a log on rank 0 alone."""
        self.nonfinite: NonFinite | None = None  # of the newest step, where it was skipped for one
        self.drifted: tuple[str, ...] = ()  # parameters whose copies differed at the last check
        self._trainer, self._monitor, self._out_dir = trainer, recipe.monitor, out_dir
        self._note: Callable[[str], None] | None = None if log is None else log.note
        self._refused = False
        # whether a difference stops the run, where the recipe says so. Nobody has shown yet that copies stay equal on every GPU:
        # there a check must have found them equal before
        self._drift_stops = trainer.grid.device.type == "cpu"
        self._off: set[str] = set()  # parts that raised
        self._stats = ParameterStats(trainer, recipe.optimizer.clip)
        self._writers: dict[str, StatsWriter] = {}
        self.rewind(resumed_step)

    def rewind(self, step: int | None) -> None:
        """The run resumes after `step` (None: from its start): what was written of later steps no longer counts."""
        self.close()
        if self._note is not None and (self._monitor.every_steps or self._monitor.activations_every_steps):
            layers = tuple(str(layer) for layer in range(self._stats.layers.depth))
            kinds = {PARAMETERS: self._stats.names, ACTIVATIONS: layers}
            if (routers := self._trainer.stage.router_losses) is not None:
                kinds[ROUTERS] = tuple(router.name for router in routers.plan.routers)
                kinds[EXPERTS] = expert_names(routers.plan)
            for kind, names in kinds.items():
                try:
                    self._writers[kind] = StatsWriter(self._out_dir, kind, names, step)
                except Exception as error:  # a full disk, a damaged file: the run goes on without
                    self._say(f"monitor: tensor_stats of {kind} are not written: {type(error).__name__}: {error}")

    def before_step(self, step: int) -> None:
        rules = self._monitor
        self._stats.begin(parameters=due(rules.every_steps, step), layers=due(rules.activations_every_steps, step))

    def after_step(
        self, step: int, result: StepResult, micro_batches: list[torch.Tensor], scored_tokens: int
    ) -> dict[str, float | int | str]:
        """Return fields for the step's record. Collective. Raises TrainingError for copies that differ, if on_drift is "stop"."""
        stats = self._stats.read(result, each_parameter=PARAMETERS in self._writers)
        if stats.failed:
            reason = self._stats.error
            what = "another rank failed, see its output" if reason is None else f"{type(reason).__name__}: {reason}"
            self._say_here(f"monitor: statistics are off from step {step}: {what}", here=reason is not None)
        names = ("loss_max", "loss_max_rank", "max_logit", "log_z")
        fields: dict[str, Any] = {name: getattr(result, name) for name in names} | stats.totals
        fields |= router_fields(result, self._trainer.stage.router_losses)
        self.nonfinite = None
        if result.skip_reason == NONFINITE:
            with self._part("the search for what was not finite", step):
                self.nonfinite = find_nonfinite(self._trainer, micro_batches, scored_tokens)
            fields["skip_reason"] = "not finite" if self.nonfinite is None else str(self.nonfinite)
            self._say(f"step {step} skipped: {fields['skip_reason']}")
        with self._stats.guarded():
            self._write(step, PARAMETERS, stats.values or self._counts_of_nonfinite(step))
            if stats.activations is not None:
                self._write(step, ACTIVATIONS, stats.activations)
                for name, values in stats.activations.items():
                    if np.isfinite(values).any():
                        fields[f"{name}/max"] = float(np.nanmax(values))
        self._write_routers(step, result)
        if due(self._monitor.drift_every_steps, step) and DRIFT not in self._off:
            with self._part(DRIFT, step):
                fields |= self._check_drift(step)
        return fields

    def _write_routers(self, step: int, result: StepResult) -> None:
        routers = self._trainer.stage.router_losses
        if routers is not None and due(self._monitor.every_steps, step):
            self._write(step, ROUTERS, router_values(result, routers.plan))
        if routers is not None and due(self._monitor.activations_every_steps, step):
            self._write(step, EXPERTS, expert_values(result))

    @contextmanager
    def _part(self, name: str, step: int) -> Iterator[None]:
        """Turn a part off where it raises; what is raised in it is raised on every rank alike."""
        try:
            yield
        except TrainingError:
            raise
        except Exception as error:
            self._off.add(name)
            self._say_here(f"monitor: {name} is off from step {step}: {error}", here=error.__cause__ is not None)

    def close(self) -> None:
        for writer in self._writers.values():
            with contextlib.suppress(OSError):
                writer.close()
        self._writers.clear()

    def _check_drift(self, step: int) -> dict[str, str]:
        drifts = find_drift(self._trainer)
        found = [str(drift) for drift in drifts[:8]] + ([f"and {len(drifts) - 8} more"] if len(drifts) > 8 else [])
        stops, self._drift_stops = self._drift_stops, self._drift_stops or not drifts
        if drifts and stops and self._monitor.on_drift == "stop":
            raise TrainingError(
                f"step {step}: copies of one parameter are no longer equal: {'; '.join(found)}. A rank computes wrongly, or "
                "leaves a gradient out. Resume from a checkpoint; with monitor.on_drift='log' the run continues regardless"
            )
        names = tuple(sorted({drift.name for drift in drifts}))
        if names != self.drifted:  # once, not at every check
            self._say(f"step {step}: copies differ: {'; '.join(found)}" if drifts else f"step {step}: all copies are equal again")
        self.drifted = names
        return {"drift": "; ".join(found)} if drifts else {}

    def _counts_of_nonfinite(self, step: int) -> Mapping[str, np.ndarray]:
        """Return all that a skipped step has: how many elements of each gradient were not finite."""
        if self.nonfinite is None or not due(self._monitor.every_steps, step):
            return {}
        counts = dict(self.nonfinite.gradients)
        values = {stat: np.full(len(self._stats.names), np.nan) for stat in STATS}
        return values | {"nonfinite": np.array([counts.get(name, 0) for name in self._stats.names], dtype=float)}

    def _write(self, step: int, kind: str, values: Mapping[str, np.ndarray]) -> None:
        if not values or kind not in self._writers:
            return
        try:
            self._writers[kind].append(step, values)
            self._refused = False
        except OSError as error:  # a full disk: the run matters more than its statistics
            if not self._refused:
                self._say(f"writing tensor_stats of step {step} failed: {error}")
            self._refused = True

    def _say_here(self, text: str, *, here: bool) -> None:
        """Say it on rank 0, and on this rank where the cause is here."""
        self._say(text)
        if here and self._note is None:
            print(f"rank {self._trainer.grid.rank}: {text}", file=sys.stderr, flush=True)

    def _say(self, text: str) -> None:
        if self._note is not None:
            self._note(text)
