"""Rehearses one rank: builds its real trainer on a stand-in for its GPU and for the other ranks, and runs real steps.

Nothing of the trainer, DeepSpeed's engine, its CUDA paths or the model is changed; only tensors have no memory, kernels take no
time, and messages go nowhere. A process rehearses once: torch.distributed has one world.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from recipes.common.checkpoint.resume import load_state
from recipes.common.checkpoint.saver import Saver
from recipes.common.checks.model_checks import layer_chunks
from recipes.common.config.ds_config import load_ds_config, merge_ds_config, precision
from recipes.common.engine import zero_state
from recipes.common.engine.build_trainer import build_trainer
from recipes.common.engine.trainer import Trainer
from recipes.common.model.decoder import find_stack
from recipes.common.model.initial_weights import build_empty
from recipes.common.monitor.parameter_stats import ParameterStats
from recipes.common.monitor.replica_drift import find_drift
from recipes.common.pipeline import stage
from recipes.common.pipeline.crossings import find_crossings
from recipes.common.pipeline.places import Crossings
from recipes.common.pipeline.stage_messages import shape_message
from recipes.common.recipe import Layout, Recipe, derive_sizes
from recipes.common.runtime.step_clock import CLOCK, HOST, OTHER
from tools.common.devices import Device
from tools.plan.rehearsal.cuda_stand_in import fake_cuda
from tools.plan.rehearsal.nccl_stand_in import Traffic, start_world
from tools.plan.rehearsal.recorder import Recorder
from tools.plan.rehearsal.rehearsal_case import Rehearsal

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_DOCUMENT_TOKENS = 1000  # of each document, where attention stays inside them
_DOCUMENT_END = 0


def rehearse(case: Rehearsal, device: Device, prepare: Callable[[Trainer, Recorder], None] | None = None) -> dict[str, Any]:
    """Run the case's steps and return what was recorded, as plain values. prepare: changes the trainer first."""
    recorder = Recorder()
    traffic = Traffic(recorder.lines.here, recorder.wait, lambda: recorder.flops)
    recipe = _with_batch(case, max(case.micro_batches))
    sizes = derive_sizes(recipe, case.layout, case.world_size)
    ds_config = merge_ds_config(load_ds_config(recipe.deepspeed), recipe, sizes, sizes.accumulation)
    os.environ.update(RANK=str(case.rank), LOCAL_RANK="0", WORLD_SIZE=str(case.world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", GLOO_SOCKET_IFNAME="lo")  # nobody connects
    start_world(case.rank, case.world_size, traffic)
    traffic.incoming = _neighbours_shape(recipe, case.layout, _DTYPES[precision(ds_config)])
    crossings = _crossings(recipe, case.layout)
    with (
        fake_cuda(recorder, int(device.memory), device.name),
        mock.patch.object(stage, "find_crossings", lambda *_: crossings),
    ):
        trainer = _build(recipe, case.layout, ds_config)
        layers = trainer.stage.causal.get_submodule(trainer.stage.stack.layers)
        recorder.lines.watch_layers([layers[index] for index in trainer.stage.own_layers])
        if prepare is not None:
            prepare(trainer, recorder)
        at_start = recorder.memory.peak
        run = _Run(recipe, trainer, recorder, traffic)
        phases = [run.step(index, count) for index, count in enumerate(case.micro_batches, 1)]
        phases += [run.extra(name, case.micro_batches[-1]) for name in case.extras]
        return {
            "rank": case.rank,
            "world_size": case.world_size,
            "stage": trainer.grid.pipeline_rank,
            "own_layers": list(trainer.stage.own_layers),
            "parameters": sum(parameter.numel() for parameter in trainer.stage.parameters()),
            "at_start": at_start,
            "group_calls": traffic.group_calls,
            "phases": phases,
            "broken": dict(traffic.broken),
            "unanswered": dict(recorder.unanswered),
            "calls": [asdict(call) for call in traffic.calls],
            "group_names": _group_names(trainer),
        }


def _build(recipe: Recipe, layout: Layout, ds_config: dict[str, Any]) -> Trainer:
    return build_trainer(
        recipe.model,
        layout,
        recipe.optimizer,
        ds_config,
        device_type="cuda",
        seq_len=recipe.batch.seq_len,
        attention=recipe.attention,
        seed=recipe.seed,
        z_loss=recipe.z_loss,
        chunk_tokens=recipe.logits_chunk_tokens,
        kernels=recipe.kernels,
        precision=recipe.precision,
        document_end=_DOCUMENT_END if recipe.mask_documents else None,
    )


def _crossings(recipe: Recipe, layout: Layout) -> Crossings:
    """Return what crosses a cut of the model. The trial that tells compares values: it needs tensors that have some."""
    causal = build_empty(recipe.model, recipe.attention)
    stack = find_stack(causal)
    return find_crossings(causal, stack, recipe.attention, layer_chunks(recipe, causal, stack, layout))


class _Run:
    """The steps of one rehearsal."""

    def __init__(self, recipe: Recipe, trainer: Trainer, recorder: Recorder, traffic: Traffic) -> None:
        self._recipe, self._trainer, self._recorder, self._traffic = recipe, trainer, recorder, traffic
        self._stats = ParameterStats(trainer, recipe.optimizer.clip)
        CLOCK.start(trainer.grid, trainer.grid.device, trainer.grid.timed_groups())

    def step(self, index: int, count: int) -> dict[str, Any]:
        """Rehearse an optimizer step of `count` micro batches."""
        return self._phase(f"step {index}", count, lambda: self._train(index, count))

    def extra(self, name: str, count: int) -> dict[str, Any]:
        """Rehearse one of EXTRAS, where it has steps with `count` micro batches."""
        work = {
            "layers": lambda: self._train(0, count, layers=True),
            "evaluate": lambda: self._evaluate(count),
            "drift": lambda: find_drift(self._trainer),
            "skip": lambda: self._train(0, count, ceiling=1e-9),  # the norm of a rehearsed step is 1, with a loss scale too
            "save": self._save,
            "load": self._load,
        }[name]
        return self._phase(name, count, work)

    def _phase(self, name: str, count: int, work: Callable[[], Any]) -> dict[str, Any]:
        recorder, first = self._recorder, len(self._traffic.calls)
        self._traffic.phase = name
        records, started = recorder.begin(), time.perf_counter()
        said = work()
        return {
            "name": name, "micro_batches": count, "seconds": time.perf_counter() - started, "said": said,
            "peak": recorder.memory.peak, "after": recorder.memory.now,
            "held": [asdict(held) for held in recorder.memory.held_at_peak()],
            "waits": [[what, line, times] for (what, line), times in records.waits.items()],
            "work": [[*key, kernels.kernels, kernels.bytes, kernels.flops] for key, kernels in records.work.items()],
            "first_call": first,
        }  # fmt: skip

    def _train(self, index: int, count: int, *, layers: bool = False, ceiling: float = math.inf) -> dict[str, Any]:
        trainer, batch = self._trainer, self._recipe.batch
        global_seqs = count * batch.micro_seqs * trainer.grid.readers
        trainer.set_global_seqs(global_seqs)
        CLOCK.begin_step(index)
        CLOCK.phase(OTHER)
        self._stats.begin(parameters=True, layers=layers)
        result = trainer.train_step(self._tokens(count), 1e-4, global_seqs * batch.seq_len, (False, False, False), ceiling)
        CLOCK.phase(HOST)
        read = self._stats.read(result)
        CLOCK.end_step()
        CLOCK.settle()
        CLOCK.taken()
        assert not read.failed, self._stats.error
        return {"skipped": result.skipped, "skip_reason": result.skip_reason}

    def _evaluate(self, count: int) -> None:
        rows = torch.ones(self._recipe.batch.micro_seqs, dtype=torch.bool)
        micro_batches = [(tokens, rows) for tokens in self._tokens(count)]
        self._trainer.evaluate(micro_batches, count * self._recipe.batch.micro_seqs * self._recipe.batch.seq_len)

    def _save(self) -> int:
        """Copy the state to the host as a save does. Nothing is written. Returns the bytes."""
        with tempfile.TemporaryDirectory() as folder:
            saver = Saver(Path(folder), self._trainer, self._recipe, None)
            return sum(part.data.nbytes for part in saver._parts())

    def _load(self) -> None:
        """Fill the state as a resume does, from a checkpoint without values."""
        load_state(_BlankCheckpoint(self._trainer), self._trainer)

    def _tokens(self, count: int) -> list[torch.Tensor]:
        """Return micro batches as the data reader gives them: on the host, of documents of equal length."""
        batch, made = self._recipe.batch, []
        for _ in range(count):
            tokens = torch.ones(batch.micro_seqs, batch.seq_len + 1, dtype=torch.int64)
            tokens[:, _DOCUMENT_TOKENS::_DOCUMENT_TOKENS] = _DOCUMENT_END
            made.append(tokens)
        return made


class _BlankCheckpoint:
    """Answers as a checkpoint's Reader whose every number is 0."""

    def __init__(self, trainer: Trainer) -> None:
        self.folder, self._trainer = "a blank checkpoint", trainer
        self.tensors = self.shapes = trainer.stage.whole_shapes
        self.state = {"optimizer_steps": zero_state.optimizer_steps(trainer), "loss_scaler": zero_state.scaler_state(trainer)}

    def kinds(self) -> set[str]:
        return {kind for partition in zero_state.partitions(self._trainer) for kind in partition.states}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.shapes[name])

    def shard(self, name: str, kind: str, shard: Any, start: int, stop: int) -> Any:
        return np.zeros(stop - start, dtype=np.float32)

    def whole(self, name: str, kind: str) -> Any:
        return dict(self._trainer.stage.persistent_buffers())[name].cpu().numpy()


def _with_batch(case: Rehearsal, micro_batches: int) -> Recipe:
    """Return the recipe with a step of so many micro batches a data rank."""
    batch, layout = case.recipe.batch, case.layout
    readers = case.world_size // (layout.tensor * layout.pipeline * layout.context)
    return replace(case.recipe, batch=replace(batch, global_seqs=micro_batches * batch.micro_seqs * readers, ramp=()))


def _neighbours_shape(recipe: Recipe, layout: Layout, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor | None]:
    """Return what answers the first message between stages: the dtype and shape of the activations that follow."""
    tokens = recipe.batch.seq_len // layout.context // (layout.tensor if layout.sequence_parallel else 1)
    shape = [recipe.batch.micro_seqs, tokens, recipe.model.get_text_config().hidden_size]
    told = shape_message(dtype, shape)

    def answer(tensor: torch.Tensor) -> torch.Tensor | None:
        return told if (tensor.dtype, tensor.shape) == (told.dtype, told.shape) else None

    return answer


def _group_names(trainer: Trainer) -> dict[str, list[int]]:
    """Return the ranks of the grid's groups by name."""
    groups = {name: group for name, group in vars(trainer.grid).items() if name.endswith("_group") and group is not None}
    return {name.removesuffix("_group"): list(group.ranks) for name, group in groups.items()}
