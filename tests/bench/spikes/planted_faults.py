"""Breaks the training code of one forked process on purpose: the faults of planted causes.

Each function patches public methods in its own process, on every rank, before the run starts; what it breaks is what breaks in
practice. `at` counts steps as metrics.jsonl does: the fault first shows in the numbers of step `at`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from recipes.common.anomalies.recovery import Recovery
from recipes.common.checkpoint.reader import Reader
from recipes.common.data.order import mix
from recipes.common.data.prefetcher import Prefetcher
from recipes.common.engine import zero_state
from recipes.common.engine.trainer import Trainer
from recipes.common.monitor.monitor import RunMonitor
from recipes.common.monitor.parameter_groups import group_of
from recipes.common.pipeline.stage import Stage

Before = Callable[[Trainer, int], None]


def learning_rate_in_schedule(at: int, factor: float, steps: int) -> None:
    """Give another rate than the schedule's for some steps; the log shows what was used."""
    right = Recovery.lr_factor
    Recovery.lr_factor = lambda self, step: right(self, step) * (factor if at - 1 <= step < at - 1 + steps else 1.0)


def learning_rate_in_optimizer(at: int, factor: float, steps: int) -> None:
    """Let the optimizer use another rate than the log shows."""
    _scale_rate(lambda step: factor if at - 1 <= step < at - 1 + steps else 1.0)


def bit_flip_in_master(at: int, seed: int) -> None:
    """Flip one bit of one fp32 weight of rank 0 or 1: of a few hundred drawn bits the one that changes its weight most."""
    _around_steps(before=lambda trainer, step: _flip_master(trainer, seed) if step == at else None)


def bit_flip_in_copy(at: int, seed: int) -> None:
    """Flip one bit of the weights that one data rank computes with; the next step's exchange of weights undoes it."""

    def flip(trainer: Trainer, step: int) -> None:
        if step == at and trainer.grid.data_rank == trainer.grid.data - 1:
            matrices = [p for n, p in trainer.stage.hf_named_parameters() if p.ndim == 2]
            chosen = matrices[int(mix(np.array([seed], dtype=np.uint64))[0] % np.uint64(len(matrices)))]
            _flip(chosen.detach().view(-1), seed, largest=3e38)

    _around_steps(before=flip)


def stale_second_moment(at: int, factor: float, part: str | None = None) -> None:
    """Scale exp_avg_sq of one part of every layer, or of all, as if kept from a time of smaller gradients."""

    def scale(trainer: Trainer, step: int) -> None:
        if step == at - 1:
            for fragment, states in _fragments(trainer):
                if part is None or group_of(fragment.name)[1] == part:
                    states["exp_avg_sq"][fragment.offset : fragment.offset + fragment.stop - fragment.start].mul_(factor)

    _around_steps(before=scale)


def norm_drift(at: int, rate: float) -> None:
    """Move the norm weights of tensor rank 1 a little every step; they should equal those of rank 0."""

    def drift(trainer: Trainer, step: int) -> None:
        if step >= at - 1 and trainer.grid.tensor_rank == 1:
            _scale_masters(trainer, lambda part: part == "norm", 1 + rate)

    _around_steps(after=drift)


def attention_growth(at: int, rate: float, steps: int) -> None:
    """Let the query and key weights grow a little every step."""

    def grow(trainer: Trainer, step: int) -> None:
        if at - 1 <= step < at - 1 + steps:
            _scale_masters(trainer, lambda part: part in ("q", "k"), 1 + rate)

    _around_steps(after=grow)


def lost_micro_batch(at: int, steps: int, rank: int) -> None:
    """Let one data rank's first micro batch add neither loss nor gradient."""
    loss_of, now, counted = Stage.loss, _count_steps(), [0]

    def lose(self: Stage, hidden: torch.Tensor, labels: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        targets, weight = labels
        is_first, counted[0] = counted[0] != now[0], now[0]
        lost = is_first and at <= now[0] < at + steps and self.grid.data_rank == rank
        return loss_of(self, hidden, (targets, weight * 0.0 if lost else weight))

    Stage.loss = lose


def accumulation_not_ramped() -> None:
    """Let the batch grow at the edge of the ramp while the engine still steps after as many micro batches as before."""

    right = Trainer.set_global_seqs

    def set_global_seqs(self: Trainer, global_seqs: int) -> None:
        accumulation = global_seqs // (self.micro_seqs * self.grid.data)
        if accumulation > self.accumulation:
            self.accumulation = accumulation
        else:
            right(self, global_seqs)

    Trainer.set_global_seqs = set_global_seqs


def corrupt_shard(at: int, path: Path, kind: str, share: float, highest_id: int) -> None:
    """Turn part of a shard's bytes into zeros or noise under the running job, a few steps before they are read."""

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
    """Let the restarted job read from sequence `reset_to` on; `logged`: its own count is wrong too, else only its reader."""
    if logged:
        open_checkpoint = Reader.__init__

        def forgetful(self: Reader, folder: Path) -> None:
            open_checkpoint(self, folder)
            self.state["consumed_seqs"] = reset_to

        Reader.__init__ = forgetful
        return
    read, first = Prefetcher.next, []

    def from_the_start(self: Prefetcher, consumed: int, global_seqs: int) -> list[torch.Tensor]:
        first.append(consumed)
        return read(self, consumed - first[0] + reset_to, global_seqs)

    Prefetcher.next = from_the_start


def loss_scale_collapse(at: int, power: int) -> None:
    """Set fp16's loss scale to 2^power, where small gradients become zero, and keep it there."""

    def collapse(trainer: Trainer, step: int) -> None:
        if step == at:
            scaler = trainer.engine.optimizer.loss_scaler
            scaler.cur_scale = 2.0**power
            scaler.last_overflow_iter = scaler.cur_iter

    _around_steps(before=collapse)


def slow_rank(at: int, factor: float, rank: int) -> None:
    """Let one rank do extra work every step: `factor` times what a step took before."""
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
    """Return [the step that is being computed]; the monitor, which hears of every step before it, keeps it up to date."""
    now, before_step = [0], RunMonitor.before_step

    def counted(self: RunMonitor, step: int) -> None:
        now[0] = step
        before_step(self, step)

    RunMonitor.before_step = counted
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
    """Scale the fp32 weights of some parts, and bring the copies up to date. Collective over data ranks."""
    for fragment, states in _fragments(trainer):
        if wanted(group_of(fragment.name)[1]):
            states[zero_state.MASTER][fragment.offset : fragment.offset + fragment.stop - fragment.start].mul_(factor)
    zero_state.publish(trainer)


def _flip_master(trainer: Trainer, seed: int) -> None:
    """Flip on rank 0 or 1 and bring the copies up to date. Collective."""
    if trainer.grid.rank == seed % dist.get_world_size():
        flat = max((p.states[zero_state.MASTER] for p in zero_state.partitions(trainer)), key=lambda f: f.numel())
        _flip(flat, seed, largest=64.0)
    zero_state.publish(trainer)


def _flip(flat: torch.Tensor, seed: int, largest: float) -> None:
    """Flip, in place, the one bit of some hundred drawn elements that gives the largest value up to `largest`."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, flat.numel(), 400)
    values = flat[chosen].float().numpy()
    bits = np.arange(23, 31, dtype=np.uint32)
    flipped = (values.view(np.uint32)[:, None] ^ (np.uint32(1) << bits)[None]).view(np.float32)
    size = np.where(np.isfinite(flipped) & (np.abs(flipped) <= largest), np.abs(flipped), 0.0)
    row, bit = np.unravel_index(int(size.argmax()), size.shape)
    with torch.no_grad():
        flat[int(chosen[row])] = float(flipped[row, bit])
