"""Wraps a stage in DeepSpeed's engine: one training step, one evaluation, by the same calls with a pipeline and without.

`train_step` is `engine.train_batch()` under the pipeline engine; without it, accumulate, forward, backward and step.
"""

from __future__ import annotations

import contextlib
import math
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

from recipes.common.data.batches import context_slice
from recipes.common.data.document_masking import document_positions
from recipes.common.engine.deepspeed_groups import Mpu
from recipes.common.engine.deepspeed_patches import patch_engine, with_experts
from recipes.common.engine.gradient_path import bucket_elements, own_gathers
from recipes.common.engine.optimizers import build_optimizer, parameter_groups
from recipes.common.engine.pipeline_stages import PipelineStages
from recipes.common.engine.startup import quiet_deepspeed
from recipes.common.model.document_bounds import no_questions, positions_on
from recipes.common.model.varlen_attention import VARLEN
from recipes.common.parallel.cross_entropy import IGNORED
from recipes.common.parallel.grid import Grid
from recipes.common.pipeline.executor import PipelineExecutor
from recipes.common.pipeline.stage import Stage
from recipes.common.pipeline.tied_embeddings import TiedHead
from recipes.common.recipe import Optimizer
from recipes.common.runtime.device_copies import CopyAhead, to_device
from recipes.common.runtime.step_clock import BACKWARD, CLOCK, FORWARD, OPTIMIZER, num_bytes
from recipes.common.runtime.supervisor_link import WAITING_FUNCTION

Labels = tuple[torch.Tensor, torch.Tensor]

OVERFLOW = "overflow"  # of fp16 gradients under a loss scale that is too large: the scale falls and training continues
TOO_HIGH = "too_high"  # a gradient norm over the ceiling that the caller gave
NONFINITE = "nonfinite"  # a NaN or an infinity in the loss or the gradients


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Results of one optimizer step, equal on every rank."""

    loss: float  # cross-entropy, the mean over the scored tokens of the global batch
    log_z_squared: float  # mean of log(Z)^2, what the z-loss weighs
    log_z: float  # mean of log(Z)
    max_logit: float  # over the scored tokens of the global batch
    loss_max: float  # the worst data rank's own loss (a NaN counts as worst)
    loss_max_rank: int  # that data rank
    grad_norm: float  # over the whole model, before clipping
    loss_scale: float  # 1.0 unless fp16
    skipped: bool  # the weights and the optimizer's state did not change, on any rank
    skip_reason: str | None  # OVERFLOW, NONFINITE or TOO_HIGH
    votes: tuple[bool, ...]  # of each vote, whether any rank said yes
    statistics: np.ndarray  # of Trainer.statistics, summed over all ranks
    router_loss: float  # the loss that balances the experts, before its coefficient; 0.0 where there is none
    router_log_z_squared: float  # mean of the routers' log(Z)^2, summed over the layers; 0.0 without a router z-loss
    router_loads: np.ndarray  # [routers, experts]: how often the global batch's tokens chose each expert
    router_entropies: np.ndarray  # [routers], nats: of a router's probabilities, the mean over the tokens


@dataclass(frozen=True, kw_only=True)
class StepSums:
    """Sums over all ranks, of one step or evaluation. Only the last stage adds losses."""

    losses: np.ndarray  # [3]: cross-entropy, log(Z)^2 and log(Z), as the stage sums them
    cross_entropy_by_rank: np.ndarray  # [data]: each data rank's own
    max_logit_by_rank: np.ndarray  # [data]
    votes: np.ndarray  # [votes]: how many ranks voted yes
    router_sums: np.ndarray  # [2]: as RouterLosses sums them
    router_counts: np.ndarray  # RouterLosses.counted, flat
    statistics: np.ndarray  # [n]: see Trainer.statistics


class Trainer:
    """Holds a stage, its optimizer and DeepSpeed's engine, and trains. The loop and the state of a run are elsewhere."""

    def __init__(
        self, stage: Stage, grid: Grid, optimizer: Optimizer, ds_config: dict[str, Any], document_end: int | None = None
    ) -> None:
        """document_end: the id that ends a document, where attention stays inside documents."""
        self.stage, self.grid, self.document_end = stage, grid, document_end
        offload = "offload_optimizer" in ds_config.get("zero_optimization", {})
        # DeepSpeed knows optimizers by their class; tests hold ours to torch's
        ds_config = ds_config | {"zero_allow_untested_optimizer": True}
        groups = parameter_groups(stage, optimizer, bucket_elements(ds_config, grid))
        self.optimizer = build_optimizer(groups, optimizer, grid.device, offload=offload)
        with quiet_deepspeed(), with_experts(any(True for _ in stage.banks())):
            if grid.pipeline > 1:
                topology = PipeModelDataParallelTopology(num_pp=grid.pipeline, num_mp=grid.tensor, num_dp=grid.data)
                module, mpu = PipelineStages(stage, topology), None
            else:
                module, mpu = stage, Mpu(grid)
                if ds_config["zero_optimization"]["stage"] == 3:  # the loss reads the head outside the head's own forward
                    for parameter in stage.head_parameters:
                        deepspeed.zero.register_external_parameter(stage, parameter)
            self.engine = deepspeed.initialize(model=module, optimizer=self.optimizer, config=ds_config, mpu=mpu)[0]
        if grid.folded and stage.stack.tied and stage.is_first:
            module.tied_head = TiedHead(stage)
        self._executor = PipelineExecutor(self.engine, stage, grid) if grid.pipeline > 1 else None
        late = module.late_weights() if grid.pipeline > 1 else []
        self._gate, self._buckets = patch_engine(self.engine, grid, self._executor, late)
        if self._buckets is not None and grid.pipeline > 1 and module.tied_head is not None:
            module.tied_head.add_in_products()
        self._gathers = own_gathers(self.engine, stage)
        self._copy_ahead = CopyAhead(grid.device)
        self.accumulation = ds_config["gradient_accumulation_steps"]
        self.micro_seqs = ds_config["train_micro_batch_size_per_gpu"]
        self.untouched: Collection[str] = ()  # parameters of this stage that no gradient has ever reached
        # called once a step has been taken: fp64 [n], of one length on all ranks, to be summed over them with the losses
        self.statistics: Callable[[], torch.Tensor] | None = None

    def set_global_seqs(self, global_seqs: int) -> None:
        """Change the number of micro batches in a step (a batch ramp); their size stays."""
        accumulation = global_seqs // (self.micro_seqs * self.grid.readers)
        if accumulation != self.accumulation:
            self.engine.set_train_batch_size(global_seqs * self.grid.context)  # DeepSpeed knows data ranks only
            self.engine.micro_steps = 0  # counted modulo the accumulation: the old count would end a step too early
            self.accumulation = accumulation

    def train_step(
        self,
        micro_batches: list[torch.Tensor],
        lr: float,
        scored_tokens: int,
        votes: tuple[bool, ...] = (),
        norm_ceiling: float = math.inf,
    ) -> StepResult:
        """Take one optimizer step. micro_batches: this data rank's, each [micro_seqs, seq_len + 1] ids, on the CPU; context ranks
        get the same, and take their slices.

        scored_tokens: targets in the global batch. votes: yes-or-no questions that any rank may answer yes; they are summed with
        the losses. norm_ceiling: the step is skipped if its gradient norm is higher. A step waits for the device when the norm
        is known and when its results are, whatever the number of micro batches.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        skipped_before = self.engine.skipped_steps
        self._gate.open(norm_ceiling, self._loss_scale())
        finite = True
        try:
            self.run_micro_batches(micro_batches, scored_tokens)
        except AssertionError as error:
            # BF16_Optimizer fails on a norm that is not a number with a bare assertion, on every rank alike, before the step
            if Path(traceback.extract_tb(error.__traceback__)[-1].filename).name != "bf16_optimizer.py":
                raise
            finite = False
        sums = self._sum_over_ranks(votes)
        losses, by_rank = sums.losses / (len(micro_batches) * self.grid.data), sums.cross_entropy_by_rank / len(micro_batches)
        worst = int(np.argmax(by_rank))  # the first NaN, where there is one
        skipped = self.engine.skipped_steps > skipped_before
        overflowed = self.engine.fp16_enabled() and np.isfinite(losses[0])
        routers = self.stage.router_losses
        router_sums = sums.router_sums / (len(micro_batches) * self.grid.readers)
        counted = sums.router_counts.reshape((0, 2) if routers is None else routers.counted.shape)
        loads = counted[:, :-2]
        if routers is not None and routers.plan.bias_rate and not skipped:
            routers.move_biases(torch.from_numpy(loads))
        refused, norm = self._gate.refused_norm, self._grad_norm()
        reason = TOO_HIGH if refused is not None else OVERFLOW if overflowed else NONFINITE
        return StepResult(
            loss=float(losses[0]),
            log_z_squared=float(losses[1]),
            log_z=float(losses[2]),
            max_logit=float(sums.max_logit_by_rank.max()),
            loss_max=float(by_rank[worst]),
            loss_max_rank=worst,
            grad_norm=refused if refused is not None else norm if finite else float("nan"),
            loss_scale=self._loss_scale(),
            skipped=skipped,
            skip_reason=reason if skipped else None,
            votes=tuple(count > 0 for count in sums.votes),
            statistics=sums.statistics,
            router_loss=float(router_sums[0]),
            router_log_z_squared=float(router_sums[1]),
            router_loads=loads,
            router_entropies=counted[:, -2] / counted[:, -1].clip(1),
        )

    def _grad_norm(self) -> float:
        norm = self.engine.get_global_grad_norm()
        return 0.0 if norm is None else float(norm)

    def _loss_scale(self) -> float:
        return float(getattr(self.engine.optimizer, "cur_scale", 1.0)) if self.engine.fp16_enabled() else 1.0

    def run_micro_batches(self, micro_batches: list[torch.Tensor], scored_tokens: int) -> None:
        """Run forward, backward and the optimizer's step, which DeepSpeed skips where the gradient norm is not finite."""
        self._clear_losses()
        self._set_document_positions(micro_batches)
        weight = len(micro_batches) * self.grid.data / scored_tokens
        if self.stage.router_losses is not None:
            self._begin_router_losses(micro_batches, weight)
        batches = self._batches(micro_batches, weight)
        with self._no_questions(), self._known_share(len(micro_batches)):
            if self.grid.pipeline > 1:
                self.engine.train_batch(batches)
                return
            self.engine.train()
            for index, (ids, labels) in enumerate(batches):
                with CLOCK.span(FORWARD):
                    loss = self.engine(ids, labels)
                if self._buckets is not None and index == len(micro_batches) - 1:
                    self._buckets.expect_all()
                with CLOCK.span(BACKWARD):
                    self.engine.backward(loss)
                with CLOCK.span(OPTIMIZER):
                    self.engine.step()

    def evaluate(self, micro_batches: list[tuple[torch.Tensor, torch.Tensor]], scored_tokens: int) -> float:
        """Return the mean cross-entropy over `scored_tokens` targets; a micro batch: ids [micro_seqs, seq_len + 1], row mask."""
        self._clear_losses()
        weight = 1.0 / scored_tokens
        self._set_document_positions([tokens for tokens, _ in micro_batches])
        batches = self._batches((tokens for tokens, _ in micro_batches), weight, [rows for _, rows in micro_batches])
        self._run_forward(batches, len(micro_batches))
        return float(self._sum_over_ranks(measure=False).losses[0])

    def _run_forward(self, batches: Iterator[tuple[torch.Tensor, Labels]], count: int) -> None:
        with self._no_questions():
            if self._executor is not None:
                self._executor.evaluate(batches, count)
            else:
                self.engine.eval()
                with torch.no_grad():
                    for ids, labels in batches:
                        self.engine(ids, labels)

    def _begin_router_losses(self, micro_batches: list[torch.Tensor], weight: float) -> None:
        """Tell the routers by what DeepSpeed multiplies the loss, and count the whole step ahead where their loss wants that."""
        routers, count = self.stage.router_losses, len(micro_batches)
        routers.begin_step(self._loss_scale() / count)
        if routers.wants_counts_ahead and count > 1:
            routers.begin_counting_ahead()
            self._run_forward(self._batches(micro_batches, weight), count)
            routers.end_counting_ahead(count)
            self._clear_losses()
            self._set_document_positions(micro_batches)

    def _clear_losses(self) -> None:
        self.stage.loss_sums.zero_()
        self.stage.max_logit.fill_(-torch.inf)

    @contextlib.contextmanager
    def _known_share(self, micro_batches: int) -> Iterator[None]:
        """Tell the stage by what the engine multiplies the loss meanwhile; not in fp16, whose gradients would underflow."""
        self.stage.loss_share = None if self.engine.fp16_enabled() else 1.0 / micro_batches
        try:
            yield
        finally:
            self.stage.loss_share = None

    def _no_questions(self) -> contextlib.AbstractContextManager[None]:
        return no_questions(documents=self.document_end is not None and self.stage.attention != VARLEN)

    def _batches(
        self, micro_batches: Iterable[torch.Tensor], weight: float, rows: list[torch.Tensor] | None = None
    ) -> Iterator[tuple[torch.Tensor, Labels]]:
        scale = torch.full((), weight, dtype=torch.float32, device=self.grid.device)
        for ids, targets in self._copy_ahead(self._ids_and_targets(micro_batches, rows)):
            yield ids, (targets, scale)

    def _ids_and_targets(
        self, micro_batches: Iterable[torch.Tensor], rows: list[torch.Tensor] | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for index, tokens in enumerate(micro_batches):
            tokens = context_slice(tokens, self.grid.context_rank, self.grid.context)
            targets = tokens[:, 1:]
            if rows is not None:
                targets = targets.masked_fill(~rows[index].view(-1, 1), IGNORED)
            yield tokens[:, :-1].contiguous(), targets.contiguous()

    def _set_document_positions(self, micro_batches: list[torch.Tensor]) -> None:
        """Give any stage the positions of its micro batches. Every stage reads the data, so nothing has to be sent."""
        if self.document_end is not None:
            positions = (document_positions(tokens[:, :-1], self.document_end) for tokens in micro_batches)
            self.stage.set_positions(positions_on(self.grid.device, p) for p in positions)

    def _sum_over_ranks(self, votes: tuple[bool, ...] = (), *, measure: bool = True) -> StepSums:
        """Reduce a step's results over all ranks, in its one collective of this kind. measure: with the step's statistics."""
        losses, routers = self.stage.loss_sums, self.stage.router_losses
        if routers is None or not measure:
            router_sums, router_counts = losses.new_zeros(2), losses.new_zeros(0)
        else:  # every tensor rank has the same
            counted = float(self.grid.tensor_rank == 0)
            router_sums, router_counts = routers.sums * counted, routers.counted.flatten() * counted
        cross_entropy, max_logit = losses.new_zeros(2, self.grid.data)  # a slot each: summed with zeros it stays what it is
        if self.grid.is_last_stage and self.grid.tensor_rank == 0:
            cross_entropy[self.grid.data_rank], max_logit[self.grid.data_rank] = losses[0], self.stage.max_logit
        else:
            losses = torch.zeros_like(losses)
        parts = {
            "losses": losses,
            "cross_entropy_by_rank": cross_entropy,
            "max_logit_by_rank": max_logit,
            "votes": to_device(torch.tensor(votes, dtype=losses.dtype), losses.device),
            "router_sums": router_sums,
            "router_counts": router_counts,
            "statistics": self.statistics() if measure and self.statistics is not None else losses.new_zeros(0),
        }
        sums = torch.cat(list(parts.values()))
        if dist.get_world_size() > 1:
            with CLOCK.collective("all_reduce", num_bytes(sums), None):
                dist.all_reduce(sums)
        CLOCK.settle()  # while a GPU still computes what the next line waits for
        fields = sums.cpu().split([part.numel() for part in parts.values()])
        return StepSums(**{name: values.numpy() for name, values in zip(parts, fields, strict=True)})

    def leave_weights_to_next_step(self) -> None:
        """Let steps gather updated weights beside the next forward pass, where they can (ZeRO 1 and 2).

        Whoever reads weights between steps, but by `evaluate` or `hf_shards`, calls `wait_for_weights` first.
        """
        if self._gathers is not None:
            self._gathers.beside_next_step = True

    def wait_for_weights(self) -> None:
        """Wait until this rank has all weights, where the last step has left that to the next one."""
        if self._gathers is not None:
            self._gathers.wait()

    def hf_shards(self) -> dict[str, torch.Tensor]:
        """Return Hugging Face name -> this rank's shard of the weights that the model computes with."""
        self.wait_for_weights()
        return {name: parameter.detach() for name, parameter in self.stage.hf_named_parameters()}


assert WAITING_FUNCTION in vars(Trainer), "a hang report finds waiting ranks by this function's name"
