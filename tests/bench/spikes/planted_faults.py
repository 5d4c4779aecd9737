"""The faults of planted causes, put into the training code of one forked process. Nothing of it is ever in a user's run.

Each function patches the real code in its own process, on every rank, before the run starts; what it breaks is what breaks in
practice. `at` counts steps as metrics.jsonl does: the fault first shows in the numbers of step `at`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipes.common import train
from recipes.common.checkpoint.position import RunPosition
from recipes.common.data.order import mix
from recipes.common.engine import trainer as engine
from recipes.common.engine import zero_state
from recipes.common.engine.trainer import Trainer
from recipes.common.monitor.parameter_groups import group_of

Before = Callable[[Trainer, int], None]


def learning_rate_in_schedule(at: int, factor: float, steps: int) -> None:
    """The schedule's code gives another rate for some steps; the log shows what was used."""
    right = train.learning_rate_at
    train.learning_rate_at = lambda recipe, step, tokens: (
        right(recipe, step, tokens) * (factor if at - 1 <= step < at - 1 + steps else 1.0)
    )


def learning_rate_in_optimizer(at: int, factor: float, steps: int) -> None:
    """The optimizer uses another rate than the log shows."""
    _scale_rate(lambda step: factor if at - 1 <= step < at - 1 + steps else 1.0)


def bit_flip_in_master(at: int, seed: int) -> None:
    """One bit of one fp32 weight of rank 0 or 1: the one bit, of a few hundred drawn, that changes its weight most."""
    _around_steps(before=lambda trainer, step: _flip_master(trainer, seed) if step == at else None)


def bit_flip_in_copy(at: int, seed: int) -> None:
    """One bit of the weights that one data rank computes with; the next step's exchange of weights undoes it."""

    def flip(trainer: Trainer, step: int) -> None:
        if step == at and trainer.grid.data_rank == trainer.grid.data - 1:
            matrices = [p for n, p in trainer.stage.hf_named_parameters() if p.ndim == 2]
            chosen = matrices[int(mix(np.array([seed], dtype=np.uint64))[0] % np.uint64(len(matrices)))]
            _flip(chosen.detach().view(-1), seed, largest=3e38)

    _around_steps(before=flip)


def stale_second_moment(at: int, factor: float, part: str | None = None) -> None:
    """exp_avg_sq is scaled as if it had been kept from a time of smaller gradients; of one part of every layer, or of all."""

    def scale(trainer: Trainer, step: int) -> None:
        if step == at - 1:
            for fragment, states in _fragments(trainer):
                if part is None or group_of(fragment.name)[1] == part:
                    states["exp_avg_sq"][fragment.offset : fragment.offset + fragment.stop - fragment.start].mul_(factor)

    _around_steps(before=scale)


def norm_drift(at: int, rate: float) -> None:
    """The norm weights of tensor rank 1, which should equal those of rank 0, move away a little every step."""

    def drift(trainer: Trainer, step: int) -> None:
        if step >= at - 1 and trainer.grid.tensor_rank == 1:
            _scale_masters(trainer, lambda part: part == "norm", 1 + rate)

    _around_steps(after=drift)


def attention_growth(at: int, rate: float, steps: int) -> None:
    """Queries and keys grow a little every step."""

    def grow(trainer: Trainer, step: int) -> None:
        if at - 1 <= step < at - 1 + steps:
            _scale_masters(trainer, lambda part: part in ("q", "k"), 1 + rate)

    _around_steps(after=grow)


def lost_micro_batch(at: int, steps: int, rank: int) -> None:
    """One data rank's first micro batch adds neither loss nor gradient."""
    batches, now = Trainer._batches, _count_steps()

    def lose(self: Trainer, *args: Any, **kwargs: Any) -> Iterator[Any]:
        for index, (ids, (targets, weight)) in enumerate(batches(self, *args, **kwargs)):
            lost = index == 0 and at <= now[0] < at + steps and self.grid.data_rank == rank
            yield ids, (targets, weight * 0.0 if lost else weight)

    Trainer._batches = lose


def accumulation_not_ramped() -> None:
    """The batch grows at the edge of the ramp, and the engine goes on stepping after as many micro batches as before."""

    right = Trainer.set_global_seqs

    def set_global_seqs(self: Trainer, global_seqs: int) -> None:
        accumulation = global_seqs // (self.micro_seqs * self.grid.data)
        if accumulation > self.accumulation:
            self.accumulation = accumulation
        else:
            right(self, global_seqs)

    Trainer.set_global_seqs = set_global_seqs


def corrupt_shard(at: int, path: Path, kind: str, share: float, highest_id: int) -> None:
    """Part of a shard's bytes become zeros or noise under the running job, a few steps before they are read."""

    def corrupt(trainer: Trainer, step: int) -> None:
        if step == max(at - 2, 1) and trainer.grid.rank == 0:
            size = path.stat().st_size // 2
            count = int(size * share)
            noise = np.random.default_rng(at).integers(3, highest_id, count).astype("<u2")
            with path.open("r+b") as file:
                file.seek(2 * ((size - count) // 2))
                file.write(bytes(2 * count) if kind == "zeros" else noise.tobytes())

    _around_steps(before=corrupt)


def resumed_without_sampler(reset_to: int, *, logged: bool) -> None:
    """The restarted job reads from sequence `reset_to` on again; its own count is wrong too, or only its reader."""
    if logged:
        resume = train.resume

        def forgetful(*args: Any, **kwargs: Any) -> RunPosition:
            return dataclasses.replace(resume(*args, **kwargs), consumed_seqs=reset_to)

        train.resume = forgetful
        return
    read, first = train.step_micro_batches, []

    def from_the_start(stream: Any, *, consumed: int, **kwargs: Any) -> list[torch.Tensor]:
        first.append(consumed)
        return read(stream, consumed=consumed - min(first) + reset_to, **kwargs)

    train.step_micro_batches = from_the_start


def loss_scale_collapse(at: int, power: int) -> None:
    """fp16's loss scale falls to 2^power, where small gradients become zero, and stays."""

    def collapse(trainer: Trainer, step: int) -> None:
        if step == at:
            scaler = trainer.engine.optimizer.loss_scaler
            scaler.cur_scale = 2.0**power
            scaler.last_overflow_iter = scaler.cur_iter

    _around_steps(before=collapse)


def slow_rank(at: int, factor: float, rank: int) -> None:
    """One rank does extra work every step: `factor` times what a step took before."""
    usual: list[float] = []
    step_of = Trainer.train_step
    now = _count_steps()

    def train_step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = step_of(self, *args, **kwargs)
        if now[0] < at:
            usual.append(time.perf_counter() - started)
        elif self.grid.rank == rank:
            until = time.perf_counter() + factor * float(np.median(usual))
            work = torch.ones(64, 64)
            while time.perf_counter() < until:
                work = work @ work / 64
        return result

    Trainer.train_step = train_step


def allow_fp16() -> None:
    """DeepSpeed refuses fp16 on most CPUs, and torch computes it on all."""
    from deepspeed.accelerator import get_accelerator

    kind = type(get_accelerator())
    supported = kind.supported_dtypes
    kind.is_fp16_supported = lambda self: True
    kind.supported_dtypes = lambda self: list({*supported(self), torch.half})


def _around_steps(before: Before | None = None, after: Before | None = None) -> None:
    """Call `before` and `after` around every training step, with the step's number."""
    now = _count_steps()
    train_step = Trainer.train_step

    def wrapped(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(self, now[0])
        result = train_step(self, *args, **kwargs)
        if after is not None:
            after(self, now[0])
        return result

    Trainer.train_step = wrapped


def _count_steps() -> list[int]:
    """[the step that is being computed], kept up to date by the learning rate that each step asks for."""
    now, rate_at = [0], train.learning_rate_at

    def counted(recipe: Any, step: int, tokens: int) -> float:
        now[0] = step
        return rate_at(recipe, step, tokens)

    train.learning_rate_at = counted
    return now


def _scale_rate(factor_at: Callable[[int], float]) -> None:
    now = _count_steps()
    train_step = Trainer.train_step

    def scaled(self: Trainer, micro_batches: list[torch.Tensor], lr: float, *args: Any, **kwargs: Any) -> Any:
        return train_step(self, micro_batches, lr * factor_at(now[0]), *args, **kwargs)

    Trainer.train_step = scaled


def _fragments(trainer: Trainer) -> Iterator[tuple[zero_state.Fragment, dict[str, torch.Tensor]]]:
    for partition in zero_state.partitions(trainer):
        for fragment in partition.fragments:
            yield fragment, partition.states


def _scale_masters(trainer: Trainer, wanted: Callable[[str], bool], factor: float) -> None:
    """The fp32 weights of some parts; the weights that the model computes with follow at the next step."""
    for fragment, states in _fragments(trainer):
        if wanted(group_of(fragment.name)[1]):
            states[zero_state.MASTER][fragment.offset : fragment.offset + fragment.stop - fragment.start].mul_(factor)


def _flip_master(trainer: Trainer, seed: int) -> None:
    """Collective: rank 0 or 1 flips, and the copies follow."""
    if trainer.grid.rank == seed % engine.dist.get_world_size():
        flat = max((p.states[zero_state.MASTER] for p in zero_state.partitions(trainer)), key=lambda f: f.numel())
        _flip(flat, seed, largest=64.0)
    zero_state.publish(trainer)


def _flip(flat: torch.Tensor, seed: int, largest: float) -> None:
    """Flip the bit of some hundred drawn elements that gives the largest value up to `largest`, in place."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, flat.numel(), 400)
    values = flat[chosen].float().numpy()
    bits = np.arange(23, 31, dtype=np.uint32)
    flipped = (values.view(np.uint32)[:, None] ^ (np.uint32(1) << bits)[None]).view(np.float32)
    size = np.where(np.isfinite(flipped) & (np.abs(flipped) <= largest), np.abs(flipped), 0.0)
    row, bit = np.unravel_index(int(size.argmax()), size.shape)
    with torch.no_grad():
        flat[int(chosen[row])] = float(flipped[row, bit])
