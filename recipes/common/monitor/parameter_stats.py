"""Measures every parameter at every step, by Hugging Face name, with the same result in every layout.

Statistics are computed where the shards live: after the optimizer has updated a rank's flat fp32 partition, `optimizer_sums` sums
over each parameter's part of it. Each element of the model is counted once: by the data rank that owns it, for a replicated
parameter by tensor rank 0, for tied embeddings by the first stage. The sums are part of the one reduction that a step makes for
its loss anyway, so the monitor waits for nothing and sends nothing of its own. A rank on which measuring fails says so in that
reduction, with zeros for the rest: all ranks stop measuring at the same step, and the run goes on.

    grad_norm      before clipping, unscaled                  adam_rms       sqrt(mean(g^2 / max(v, eps^2))), v corrected for bias
    weight_norm    of the fp32 weights, after the step                       (arXiv 2304.13013; about 1; NaN without Adam)
    update_norm    of what the step added to them             tiny_v_share   share of elements with sqrt(v) < eps
    update_ratio   update_norm / weight_norm                  zero_share     share of elements whose gradient is exactly 0
    nonfinite      elements of the gradient that are NaN or infinite: 0, for a step with one is skipped (`nonfinite`)

A parameter that no gradient has ever reached (`untouched`) has none of them, and counts in no total.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from recipes.common.engine import zero_state
from recipes.common.engine.trainer import StepResult, Trainer
from recipes.common.monitor.layer_stats import LayerStats
from recipes.common.monitor.optimizer_sums import SUMS, Spans, add_sums, spans_of
from recipes.common.runtime.device_copies import to_device

STATS = ("grad_norm", "weight_norm", "update_norm", "update_ratio", "adam_rms", "tiny_v_share", "zero_share", "nonfinite")


@dataclass(frozen=True)
class StepStats:
    """One step's statistics, equal on every rank."""

    values: dict[str, np.ndarray]  # STATS -> [parameters]
    totals: dict[str, float]  # weight_norm, update_norm and update_ratio of the whole model
    activations: dict[str, np.ndarray] | None  # by layer, on steps that measure them
    failed: bool = False  # on some rank: nothing is measured from now on


class ParameterStats:
    """Measures a trainer's steps: `begin` before one, `read` the statistics from its result."""

    def __init__(self, trainer: Trainer, clip: float) -> None:
        """clip: the norm that gradients are clipped to; 0: never."""
        self.names = tuple(trainer.stage.whole_shapes)
        self.layers = LayerStats(trainer.stage)
        self._trainer, self._clip = trainer, clip
        self._rows = {name: row for row, name in enumerate(self.names)}
        self._spans: dict[int, Spans] = {}  # by the id of a partition's flat tensor
        self._with_parameters, self._with_layers = False, False
        self.error: Exception | None = None  # of this rank
        self._off = False  # all ranks know of an error, of this rank or another
        self._sums = torch.zeros(len(self.names), len(SUMS), dtype=torch.float64, device=trainer.grid.device)
        self._all_touched = self._sums.new_zeros(len(self.names))  # `_untouched` of a rank without such parameters
        self._sizes, self._padding = _sizes(trainer, self.names)
        trainer.optimizer.register_step_post_hook(self._after_update)
        trainer.statistics = self._take

    def begin(self, *, parameters: bool, layers: bool) -> None:
        """Choose what the next step measures."""
        self._with_parameters, self._with_layers = parameters and not self._off, layers and not self._off
        self._sums.zero_()
        if self._with_layers:
            with self.guarded():
                self.layers.begin()

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Keep an error of this rank, to be told to all at the next step that is measured. Nothing collective may be within."""
        try:
            yield
        except Exception as error:  # whatever it is: a run is worth more than its statistics
            self.error = self.error or error

    def _take(self) -> torch.Tensor:
        """Return the sums of the step that the trainer has just taken, as Trainer.statistics wants them: fp64 [n].

        The last is the number of ranks with an error.
        """
        if not (self._with_parameters or self._with_layers):
            return self._sums.new_zeros(0)
        if self._with_layers:
            with self.guarded():
                self.layers.end()
        if self.layers.error is not None:
            self.error = self.error or self.layers.error
        parts = [self._sums.flatten(), self._untouched()] if self._with_parameters else []
        parts += [self.layers.sums()] if self._with_layers else []
        failed = self._sums.new_full((1,), float(self.error is not None))
        if self.error is not None:
            parts = [torch.zeros_like(part) for part in parts]
        return torch.cat([*parts, failed])

    def read(self, result: StepResult, *, each_parameter: bool = True) -> StepStats:
        """Return a step's statistics; no values where it was skipped or not measured. Collective on steps that measure layers.

        each_parameter: False for totals alone, on a rank that has no use for the values; others may have.
        """
        with_parameters, with_layers = self._with_parameters, self._with_layers
        self._with_parameters, self._with_layers = False, False
        if not (with_parameters or with_layers):
            return StepStats({}, {}, None)
        if result.statistics[-1]:
            self._off = True
            return StepStats({}, {}, None, failed=True)
        count = len(self.names) if with_parameters else 0
        sums, untouched, layers = np.split(result.statistics[:-1], [count * len(SUMS), count * len(SUMS) + count])
        if with_layers:
            maxima = self.layers.maxima()
            if dist.get_world_size() > 1:
                dist.all_reduce(maxima, dist.ReduceOp.MAX)
        values, totals, activations = {}, {}, None
        with self.guarded():
            if with_layers:
                activations = self.layers.decode(layers, maxima.double().cpu().numpy())
            if with_parameters and not result.skipped:
                sums, untouched = sums.reshape(-1, len(SUMS)).T, untouched > 0
                sums[:, untouched] = 0.0
                totals = _totals(sums)
                values = self._decode(sums, result.grad_norm, untouched) if each_parameter else {}
        return StepStats(values, totals, activations)

    def _after_update(self, optimizer: torch.optim.Optimizer, args: Any, options: Any) -> None:
        """Add up one partition: DeepSpeed updates one after another, `param_groups` holds the one just updated."""
        if not self._with_parameters or self.error is not None:
            return
        with self.guarded():
            for group in optimizer.param_groups:
                for flat in group["params"]:
                    if flat.grad is not None and (spans := self._spans_of(flat)).spans:
                        add_sums(self._sums, spans, flat.detach(), flat.grad, optimizer.state[flat], group)

    def _spans_of(self, flat: torch.Tensor) -> Spans:
        if not self._spans:
            stage, grid = self._trainer.stage, self._trainer.grid
            copies = set() if grid.tensor_rank == 0 else set(self.names) - set(stage.tensor_plan.shards)
            if stage.stack.tied and not grid.is_first_stage:
                copies.add(f"{stage.stack.embedding}.weight")
            for tensor, fragments in zero_state.locate(self._trainer):
                ranges = [(self._rows[f.name], f.offset, f.offset + f.stop - f.start) for f in fragments if f.name not in copies]
                self._spans[id(tensor)] = spans_of(ranges, tensor.device.type, self._sums.device)
        return self._spans[id(flat)]

    def _untouched(self) -> torch.Tensor:
        """Return [parameters], 1 for those of this rank that no gradient has ever reached."""
        if not self._trainer.untouched:
            return self._all_touched
        flags = np.zeros(len(self.names))
        flags[[self._rows[name] for name in self._trainer.untouched]] = 1.0
        return to_device(torch.from_numpy(flags), self._sums.device)

    def _decode(self, sums: np.ndarray, grad_norm: float, untouched: np.ndarray) -> dict[str, np.ndarray]:
        """Return STATS from SUMS over all ranks, [sums, parameters]. untouched: parameters that are out of all statistics."""
        gradients, weights, updates, adam, tiny, zeros = sums
        # the optimizer was given clipped gradients; DeepSpeed divided them by this
        divided = max(1.0, (grad_norm + 1e-6) / self._clip) if self._clip else 1.0
        weight, update = np.sqrt(weights), np.sqrt(updates)
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = np.where(weight > 0, update / weight, np.nan)
        values = {
            "grad_norm": np.sqrt(gradients) * divided,
            "weight_norm": weight,
            "update_norm": update,
            "update_ratio": ratio,
            "adam_rms": np.sqrt(adam / self._sizes),
            # padding holds zeros, and is none of the model's
            "tiny_v_share": (tiny - self._padding) / self._sizes,
            "zero_share": (zeros - self._padding) / self._sizes,
            "nonfinite": np.zeros(len(self.names)),
        }
        for column in values.values():
            column[untouched] = np.nan
        return values


def _totals(sums: np.ndarray) -> dict[str, float]:
    """Return the whole model's, of SUMS over all ranks, [sums, parameters]."""
    weight, update = (math.sqrt(sums[SUMS.index(name)].sum()) for name in ("weight", "update"))
    return {"weight_norm": weight, "update_norm": update, "update_ratio": update / weight if weight else math.nan}


def _sizes(trainer: Trainer, names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return (elements, padding elements of the shards) of every parameter of the whole model: [parameters] each."""
    cuts, tensor = trainer.stage.tensor_plan.shards, trainer.grid.tensor
    sizes, padding = [], []
    for name in names:
        shape = trainer.stage.whole_shapes[name]
        size = math.prod(shape)
        held = size
        if name in cuts:
            length = shape[cuts[name].dim]
            held = size // length * cuts[name].local_length(length, tensor) * tensor
        sizes.append(size)
        padding.append(held - size)
    return np.array(sizes, dtype=np.float64), np.array(padding, dtype=np.float64)
