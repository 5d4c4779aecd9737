"""Computes the losses of routers where the routers are, and adds their gradients there; and counts the load of every expert.

`transformers` collects the logits of all routers and adds one loss at the end, which a pipeline cannot do. What it computes,

    experts * sum over experts e of f_e * P_e    f_e: share of the rows whose choice includes e    P_e: mean probability of e

with means over the tokens of a micro batch in all layers, needs of the other layers only the counts behind f, which carry no
gradient. So each stage counts in its forward pass, the counts of a micro batch are summed over its ranks beside the computation,
and each router adds its own part of the gradient in the backward pass, by when every stage has long counted: whatever the
schedule, a backward pass of a micro batch comes after all its forward passes. The gradient is added to that of the logits where
the routing weights' gradient passes (the logits themselves go nowhere in most families). The value goes to the metrics alone.

A layer that is computed again in the backward pass counts nothing then: no micro batch is entered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from recipes.common.model.routers import (
    GLOBAL_BATCH,
    SEQUENCE,
    PlannedRouter,
    RouterPlan,
    compute_in_fp32,
    of_one_token,
    weighs_by_sigmoid,
    weighs_choices,
)
from recipes.common.parallel.grid import Grid
from recipes.common.runtime.device_copies import to_device

Gradient = Callable[[torch.Tensor], torch.Tensor]


@dataclass(eq=False)
class MicroBatchCounts:
    """What one micro batch's tokens chose, on this rank and then over the ranks that share its loss."""

    tokens: int  # of the micro batch, over all context ranks
    local_length: int  # of a sequence, on this rank
    # GLOBAL_BATCH and MICRO_BATCH: [experts + 1], tokens by expert over all layers, and rows. SEQUENCE: [routers, seqs, experts]
    counts: torch.Tensor
    before: MicroBatchCounts | None = None  # the micro batches of the step so far, where the loss is of all of them
    rows: dict[int, int] = field(default_factory=dict)  # by router, of this rank, so far: MLPs may run by parts
    work: dist.Work | None = None
    number: int = 1  # of micro batches (of one reader) that `counts` is of

    def share(self, group: dist.ProcessGroup | None) -> None:
        """Begin to sum over the ranks, beside the computation."""
        if group is not None and self.counts.numel():  # of sequences, a stage may have no routers to count
            self.work = dist.all_reduce(self.counts, group=group, async_op=True)

    def total(self) -> tuple[torch.Tensor, int]:
        """Return the counts over the ranks, and `number`."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        if self.before is not None:
            counts, number = self.before.total()
            self.counts, self.before, self.number = self.counts + counts, None, number + 1
        return self.counts, self.number


class RouterLosses:
    """Hooks the routers of one stage. The stage enters and leaves it with each micro batch, the trainer begins each step."""

    def __init__(self, plan: RouterPlan, causal: nn.Module, grid: Grid, group: dist.ProcessGroup | None = None) -> None:
        """causal: with this stage's modules alone. group: the ranks over which the counts of a micro batch are summed."""
        self.plan, self._grid, self._group = plan, grid, group
        self.gradient_scale = 1.0  # what the loss is multiplied by before its backward pass; the trainer sets it
        # by micro batch of the step: this rank's first chunk has run, its last has not; and by chunk, how many have entered it
        self._waiting: dict[int, MicroBatchCounts] = {}
        self._entered: Counter[int] = Counter()
        self._current: MicroBatchCounts | None = None
        self._newest: MicroBatchCounts | None = None
        self._ahead: torch.Tensor | None = None  # counts of the whole step, where they were counted ahead
        self._counts_ahead, self._batches_ahead = False, 0
        # as the loss of a step is a mean over micro batches and data ranks: [the balancing loss, mean of (log Z)^2]
        self.sums = torch.zeros(2, dtype=torch.float64, device=grid.device)
        # by router: tokens of each expert, and of the routers' softmax the sum of its entropies (nats), and how many
        self.counted = torch.zeros(len(plan.routers), plan.experts + 2, dtype=torch.float64, device=grid.device)
        self._by_sigmoid: dict[int, bool] = {}
        self._calls: dict[int, tuple[tuple, dict[str, Any]]] = {}  # of routers whose scores are not known yet
        modules = dict(causal.named_modules())
        self.own = {index: modules[router.name] for index, router in enumerate(plan.routers) if router.name in modules}
        owners = {index: plan.routers[index].bias for index in self.own}
        # looked up at each use: moving a model to another device replaces its buffers
        self._biases = {
            index: (modules[bias.rpartition(".")[0]], bias.rpartition(".")[2]) for index, bias in owners.items() if bias
        }
        for row, (index, module) in enumerate(self.own.items()):
            if plan.fp32:
                compute_in_fp32(module, plan.routers[index].logits)
            module.register_forward_hook(partial(self._after_router, index, row, plan.routers[index]), with_kwargs=True)

    @property
    def _per_sequence(self) -> bool:
        return self.plan.loss == SEQUENCE

    def begin_step(self, gradient_scale: float) -> None:
        self.gradient_scale = gradient_scale
        self.sums.zero_()
        self.counted.zero_()
        self._waiting.clear()
        self._entered.clear()
        self._current = self._newest = self._ahead = None

    @property
    def wants_counts_ahead(self) -> bool:
        return self.plan.balances and self.plan.loss == GLOBAL_BATCH and self.plan.count_ahead

    def begin_counting_ahead(self) -> None:
        """From now until `end_counting_ahead`, forward passes without gradients count for the step to come."""
        self._counts_ahead, self._batches_ahead = True, 0
        self._ahead = self.sums.new_zeros(self.plan.experts + 1)

    def end_counting_ahead(self, micro_batches: int) -> None:
        self._counts_ahead, self._batches_ahead = False, micro_batches
        if self._group is not None:
            dist.all_reduce(self._ahead, group=self._group)

    def enter(self, chunk: int, seqs: int, local_length: int) -> None:
        """A forward pass of one of this rank's chunks begins, on `seqs` sequences."""
        if not torch.is_grad_enabled() or self._counts_ahead:
            return
        micro_batch = self._entered[chunk]
        self._entered[chunk] += 1
        if chunk == 0:
            shape = (len(self.own), seqs, self.plan.experts) if self._per_sequence else (self.plan.experts + 1,)
            counts = self.sums.new_zeros(shape)
            tokens = seqs * local_length * self._grid.context
            before = self._newest if self.plan.loss == GLOBAL_BATCH and self._ahead is None else None
            self._newest = MicroBatchCounts(tokens=tokens, local_length=local_length, counts=counts, before=before)
            self._waiting[micro_batch] = self._newest
        self._current = self._waiting[micro_batch]

    def leave(self, *, last_chunk: bool) -> None:
        """The forward pass has ended. last_chunk: this rank has counted all it will of the micro batch."""
        if self._current is not None and last_chunk:
            del self._waiting[min(self._waiting)]  # a chunk's micro batches come in order
            if self.plan.balances and self._ahead is None:
                self._current.share(self._group)
        self._current = None

    @torch.no_grad()
    def move_biases(self, loads: torch.Tensor) -> None:
        """Move this stage's biases against their experts' load. loads: [routers, experts] of the global batch, on the host.

        DeepSeek-V3's rule: an expert with more tokens than the mean loses `bias_rate`, one with fewer gains it. Loads are whole
        numbers, and so is what is compared: every layout moves the same biases.
        """
        loads = to_device(loads, self.counted.device)
        for index, (owner, leaf) in self._biases.items():
            load, bias = loads[index], getattr(owner, leaf)
            direction = torch.sign(load.sum() - self.plan.experts * load)
            bias += (self.plan.bias_rate * direction).to(bias.dtype).view_as(bias)

    def _after_router(
        self, index: int, row: int, router: PlannedRouter, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> Any:
        outputs = output if isinstance(output, tuple) else (output,)
        logits = outputs[router.logits]
        if self._counts_ahead:
            chosen = _probabilities(logits).topk(self.plan.chosen, dim=-1).indices
            self._ahead[:-1] += _count(chosen, self.plan.experts)
            self._ahead[-1] += logits.shape[0]
            return None
        if not torch.is_grad_enabled():
            return None
        record, first_row = self._current, 0
        if record is not None:
            first_row = record.rows.get(index, 0)
            record.rows[index] = first_row + logits[..., 0].numel()
            with torch.no_grad():
                self._count(record, index, row, outputs, logits, first_row)
            if self._per_sequence and index not in self._by_sigmoid and index not in self._calls:
                self._keep_call(index, outputs, args, kwargs)
        if not (self.plan.balances or self.plan.z_loss) or not logits.requires_grad:
            return None
        gradient = partial(self._gradient, record, index, row, first_row)
        place = _carrier(outputs, router)
        carrier = _AddGradient.apply(outputs[place], logits, gradient)
        return (*outputs[:place], carrier, *outputs[place + 1 :]) if isinstance(output, tuple) else carrier

    def _count(
        self, record: MicroBatchCounts, index: int, row: int, outputs: tuple, logits: torch.Tensor, first_row: int
    ) -> None:
        experts = self.plan.experts
        probabilities = _probabilities(logits)
        by_probability = probabilities.topk(self.plan.chosen, dim=-1).indices
        chosen = next((o for o in outputs if _are_choices(o, len(by_probability))), by_probability)
        self.counted[index, :experts] += _count(chosen, experts)
        self.counted[index, experts] -= probabilities.xlogy(probabilities).sum(dtype=torch.float64)
        self.counted[index, experts + 1] += len(by_probability)
        if not self.plan.balances or self._ahead is not None:
            return
        if self._per_sequence:
            sequence = self._sequences(record, first_row, len(by_probability)).unsqueeze(1)
            flat = record.counts[row].view(-1)
            places = (sequence * experts + by_probability).flatten()
            flat.index_add_(0, places, torch.ones_like(places, dtype=flat.dtype))
        else:
            record.counts[:-1] += _count(by_probability, experts)
            record.counts[-1] += len(by_probability)

    def _keep_call(self, index: int, outputs: tuple, args: tuple, kwargs: dict[str, Any]) -> None:
        """Keep how a router is called, to learn its scores in the first backward pass: recomputation must not see the trial."""
        if args and weighs_choices(outputs, self.plan.routers[index].logits):
            self._calls[index] = of_one_token(args, kwargs)
        else:
            self._by_sigmoid[index] = False

    def _weighs_by_sigmoid(self, index: int) -> bool:
        if index not in self._by_sigmoid:
            args, kwargs = self._calls.pop(index)
            self._by_sigmoid[index] = weighs_by_sigmoid(self.own[index], self.plan.routers[index].logits, args, kwargs)
        return self._by_sigmoid[index]

    def _sequences(self, record: MicroBatchCounts, first_row: int, rows: int) -> torch.Tensor:
        """Return which sequence of the micro batch each of a router's rows is of."""
        return torch.arange(first_row, first_row + rows, device=self.sums.device) // record.local_length

    def _gradient(
        self, record: MicroBatchCounts | None, index: int, row: int, first_row: int, logits: torch.Tensor
    ) -> torch.Tensor:
        """Return the gradient of this micro batch's router losses by these logits, and add their values to the sums."""
        assert record is not None, "a router ran outside a stage's forward pass"
        wide = logits.float().reshape(-1, logits.shape[-1])
        gradient = torch.zeros_like(wide)
        if self.plan.balances:
            part, value = self._balance(record, index, row, first_row, wide)
            gradient += self.plan.coefficient * part
            self.sums[0] += value
        if self.plan.z_loss:
            log_z = wide.logsumexp(-1, keepdim=True)
            gradient += (2 * self.plan.z_loss / record.tokens) * log_z * wide.softmax(-1)
            self.sums[1] += log_z.double().square().sum() / record.tokens
        # a mean over data ranks will be taken, of which context ranks hold parts of one micro batch
        return (gradient * (self.gradient_scale * self._grid.context)).view_as(logits).to(logits.dtype)

    def _balance(
        self, record: MicroBatchCounts, index: int, row: int, first_row: int, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (gradient, value) of a balancing loss without its coefficient. It is linear in the probabilities: weight * P."""
        experts = self.plan.experts
        by_sigmoid = False
        if self._per_sequence:
            counts, _ = record.total()
            length = record.local_length * self._grid.context
            scale = experts / (self.plan.chosen * length**2 * counts.shape[1])
            weight = (counts[row] * scale).float()[self._sequences(record, first_row, len(logits))]
            by_sigmoid = self._weighs_by_sigmoid(index)
        else:
            counts, number = record.total() if self._ahead is None else (self._ahead, self._batches_ahead)
            readers = self._grid.readers if self.plan.loss == GLOBAL_BATCH else 1
            # counts of `number` micro batches of all readers; the probabilities' mean is over this micro batch
            weight = (counts[:-1] * (experts * number * readers / counts[-1].square())).float()
        if by_sigmoid:
            scores = logits.sigmoid()
            p = scores / scores.sum(-1, keepdim=True)
            slope = p * (1 - scores)
        else:
            p = slope = logits.softmax(-1)
        weighed = p * weight
        return slope * (weight - weighed.sum(-1, keepdim=True)), weighed.sum(dtype=torch.float64)


class _AddGradient(torch.autograd.Function):
    """Returns a copy of its first argument, and adds a gradient to that of its second in the backward pass."""

    @staticmethod
    def forward(ctx: Any, carrier: torch.Tensor, logits: torch.Tensor, gradient: Gradient) -> torch.Tensor:
        ctx.save_for_backward(logits)
        ctx.gradient = gradient
        return carrier.clone()  # not a view: families divide routing weights in place

    @staticmethod
    def backward(ctx: Any, above: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (logits,) = ctx.saved_tensors
        return above, ctx.gradient(logits), None


def _carrier(outputs: tuple, router: PlannedRouter) -> int:
    """Return which of a router's outputs the loss reaches it through: its weights, or the logits where there is nothing else."""
    for place, output in enumerate(outputs):
        if place != router.logits and torch.is_tensor(output) and output.requires_grad:
            return place
    if len(outputs) == 1:
        return router.logits
    raise RuntimeError(f"no output of the router {router.name} has a gradient; train without a router loss: Router(loss=None)")


def _are_choices(output: Any, rows: int) -> bool:
    """Return whether a router's output says which experts each row has chosen."""
    return torch.is_tensor(output) and output.dtype in (torch.int64, torch.int32) and output.ndim == 2 and len(output) == rows


def _probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Return [rows, experts]. transformers' loss counts the experts of largest probability, whatever the router chose."""
    return logits.detach().float().reshape(-1, logits.shape[-1]).softmax(-1)


def _count(chosen: torch.Tensor, experts: int) -> torch.Tensor:
    """Return how often each expert is chosen, without waiting for the device. An id beyond the experts counts for none."""
    ids = chosen.flatten().long().clamp(max=experts)
    ones = torch.ones(ids.shape, dtype=torch.float64, device=ids.device)
    return torch.zeros(experts + 1, dtype=torch.float64, device=ids.device).index_add_(0, ids, ones)[:experts]
