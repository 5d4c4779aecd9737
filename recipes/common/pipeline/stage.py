"""Builds a pipeline stage: the Hugging Face model without the other stages' layers.

The ForCausalLM is built whole without memory; layers of other stages become placeholders that return their input, so that
indices, layer types and masks keep their meaning. A later stage injects the received activation before its first own layer, so
what a family does before the layers (embedding scale, learned positions, dropout) happens once, on the first stage. Parameter
names are Hugging Face names.

Some schedules give a rank several chunks of layers. While one of them runs, placeholders stand where the others' layers are.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from recipes.common.config.placement import Placement, placement_of
from recipes.common.model.decoder import ONLY_INFERENCE, Stack, find_stack
from recipes.common.model.flops import attention_costs, layer_costs
from recipes.common.model.fp8_linears import multiply_in_fp8
from recipes.common.model.gradient_sums import GradientSums, StepSums
from recipes.common.model.initial_weights import build_empty
from recipes.common.model.linears import defer_weight_gradients
from recipes.common.model.look_ups import add_rows_read
from recipes.common.model.main_grads import main_grad_of
from recipes.common.model.routers import RouterPlan, plan_routers
from recipes.common.model.sharding import Holdings, TensorPlan
from recipes.common.model.varlen_attention import VARLEN, VarlenAttention
from recipes.common.model.weight_grad_store import WeightGradStore
from recipes.common.parallel.context_parallel import ContextAttention, head_ranks
from recipes.common.parallel.cross_entropy import vocabulary_loss
from recipes.common.parallel.expert_parallel import spread_experts
from recipes.common.parallel.experts import expert_plan
from recipes.common.parallel.grid import Grid
from recipes.common.parallel.router_losses import RouterLosses
from recipes.common.parallel.sequence_parallel import shard_sequence
from recipes.common.parallel.tensor_parallel import apply_tensor_parallel, plan_tensor_parallel
from recipes.common.pipeline.carrier import Carrier, carrier_of
from recipes.common.pipeline.crossings import find_crossings
from recipes.common.pipeline.layer_options import keep_less, route_work
from recipes.common.pipeline.partition import chunks_by_rank, partition_layers, pass_costs
from recipes.common.pipeline.placeholders import Slot, chunk_of, run_head, take_out
from recipes.common.pipeline.schedules import Costs
from recipes.common.pipeline.stage_weights import draw_stage, holdings
from recipes.common.recipe import FP8, WHOLE, Layout, Router

NO_OPTIONS = Layout()
NO_ROUTER_LOSS = Router(loss=None)


@dataclass(frozen=True)
class PlannedModel:
    """A whole ForCausalLM on the meta device, the names of its parts, and how its parameters are sharded."""

    causal: PreTrainedModel
    stack: Stack
    tensor_plan: TensorPlan
    attention: str  # a recipe's
    head_ranks: int  # context ranks that divide heads
    routers: RouterPlan
    experts: dict[str, str]  # those that expert ranks divide: see parallel.experts.expert_plan


def plan_model(
    config: PreTrainedConfig,
    layout: Layout = NO_OPTIONS,
    *,
    attention: str = "sdpa",
    router: Router = NO_ROUTER_LOSS,
    precision: str | None = None,
) -> PlannedModel:
    """Build the model without memory and plan its sharding over the layout's tensor ranks.

    Raises PlanError when the family cannot be sharded so; `check` has asked before any process group exists.
    """
    off = {name: value for name, value in ONLY_INFERENCE.items() if getattr(config, name, value) != value}
    if layout.context > 1 or attention == VARLEN or off:
        config = copy.deepcopy(config)  # the model's attention is replaced, which its config says
        vars(config).update(off)
    causal = build_empty(config, attention)
    stack = find_stack(causal)
    options = {"sequence_parallel": layout.sequence_parallel, "whole_experts": layout.experts == WHOLE}
    tensor_plan = plan_tensor_parallel(causal, stack, layout.tensor, **options)
    routers = plan_routers(causal, stack, router)
    experts = expert_plan(causal, stack) if layout.expert > 1 else {}
    if precision == FP8:
        multiply_in_fp8(causal, stack)
    return PlannedModel(causal, stack, tensor_plan, attention, head_ranks(config, layout), routers, experts)


class Stage(nn.Module):
    """Holds the modules of one pipeline rank, sharded for one tensor rank, and runs them. Build it with `build_stage`."""

    def __init__(
        self,
        model: PlannedModel,
        grid: Grid,
        chunks: tuple[range, ...],
        *,
        held: Holdings,
        whole_shapes: dict[str, tuple[int, ...]],
        z_loss: float,
        chunk_tokens: int,
        compiled: bool,
        placement: Placement,
        pass_costs: tuple[Costs, ...],
        weight_grad_stores: tuple[WeightGradStore, ...],
        placeholders: dict[str, nn.Module],
        carrier: Carrier,
        own_attention: ContextAttention | VarlenAttention | None = None,
        router_losses: RouterLosses | None = None,
    ) -> None:
        """model: with this stage's modules alone. chunks: the layers of each, by index, in the model's order.

        held: what this rank has of each parameter.
        whole_shapes: of every parameter of the whole model, by Hugging Face name.
        compiled: compute the loss by compiled kernels.
        pass_costs: of every chunk of the model, this rank's or not.
        weight_grad_stores: each chunk's, for a schedule that defers weight gradients.
        placeholders: for this rank's own layers and norms, by name, while another chunk than theirs runs.
        carrier: of what the chunks receive and send.
        own_attention: what computes the model's attention, if not transformers: shared by context ranks, or without masks.
        router_losses: of a model with routers.
        """
        super().__init__()
        causal, stack = model.causal, model.stack
        self.causal, self.stack, self.tensor_plan, self.chunks = causal, stack, model.tensor_plan, chunks
        self.own_attention, self.attention, self.router_losses = own_attention, model.attention, router_losses
        self.own_layers = tuple(index for chunk in chunks for index in chunk)
        self.is_first, self.is_last = grid.is_first_stage, grid.is_last_stage
        self.grid, self.z_loss, self.chunk_tokens, self.compiled = grid, z_loss, chunk_tokens, compiled
        self.vocab_size = causal.config.get_text_config().vocab_size
        self.whole_shapes, self.weight_grad_stores, self.held = whole_shapes, weight_grad_stores, held
        self.placement, self.pass_costs = placement, pass_costs
        self.head_sums = StepSums(late=pass_costs[-1].late > 0.0)
        self.loss_share: float | None = None  # by what the engine multiplies a micro batch's loss, while that is known
        self._slots = [Slot(causal, name, module, chunk_of(name, stack, chunks)) for name, module in placeholders.items()]
        self.set_positions([])
        self._carrier = carrier
        # over the micro batches of a step, on the last stage: cross-entropy, log(Z)^2 and log(Z), summed and weighted
        self.register_buffer("loss_sums", torch.zeros(3, dtype=torch.float64), persistent=False)
        self.register_buffer("max_logit", torch.full((), float("-inf")), persistent=False)

    def set_positions(self, positions: Iterable[torch.Tensor]) -> None:
        """Set the position ids [micro_seqs, seq_len] of the micro batches to come, in order; none: positions count from 0.

        With context ranks, too, they are those of whole sequences.
        """
        positions = list(positions)
        self._positions = [deque(positions) for _ in self.chunks]

    def hf_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (Hugging Face name, this rank's shard). A tied head goes by the embedding's name, on every stage."""
        for name, parameter in self.causal.named_parameters():
            tied = self.stack.tied and name == f"{self.stack.head}.weight"
            yield (f"{self.stack.embedding}.weight" if tied else name), parameter

    def banks(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return the parameters of experts that expert ranks divide."""
        return ((name, parameter) for name, parameter in self.causal.named_parameters() if name in self.held.banks)

    def persistent_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Return (Hugging Face name, tensor) of the constants that a family's state dict holds; the same in every layout."""
        names = set(self.causal.state_dict())
        return ((name, buffer) for name, buffer in self.causal.named_buffers() if name in names)

    def forward(self, x: torch.Tensor, labels: tuple[torch.Tensor, torch.Tensor] | None = None, chunk: int = 0) -> torch.Tensor:
        """Run one of this rank's chunks. Returns what the next needs; with `labels` (for the model's last chunk alone) the loss.

        x: ids [micro_seqs, seq_len] for the model's first chunk, else what the chunk before returned: hidden states, or a message
        of more (`Crossings`). For example rank 0
        of 2, folded, with layers 0 and 1 in chunk 0, layers 6 and 7 in chunk 1 (layers 2 to 5 are the other rank's):

                         embedding  0  1  2  3  4  5  6  7  norm  head
            chunk 0 runs     E      0  1> .  .  .  .  .  .   .     -     ids in; layer 1's hidden states are captured
            chunk 1 runs     .      .  .  .  .  .  . >6  7   N     H     x is injected before layer 6; the model's own output
            . a placeholder: returns its input (the embedding's: zeros)     > the carrier's     - not called
        """
        base = self.causal.get_submodule(self.stack.base)
        for slot in self._slots:
            slot.fill(chunk)
        try:
            inputs, seqs, seq_len = self._carrier.begin(chunk, x)
            places = self._places(seq_len, self._positions[chunk].popleft() if self._positions[chunk] else None)
            if self.router_losses is not None:
                self.router_losses.enter(chunk, seqs, seq_len)
            out = base(**inputs, use_cache=False, **places)
            hidden = self._carrier.end(chunk, out.last_hidden_state)
        finally:
            self._carrier.clear()
            if self.router_losses is not None:
                self.router_losses.leave(last_chunk=chunk == len(self.chunks) - 1)
            for slot in self._slots:
                slot.restore()
        return hidden if labels is None else self.loss(hidden, labels)

    def _places(self, seq_len: int, positions: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Return what the base model must be told of the places of its tokens."""
        if self.own_attention is not None:
            return self.own_attention.places(seq_len, positions, self.loss_sums.device)
        return {} if positions is None else {"position_ids": positions}

    def loss(self, hidden: torch.Tensor, labels: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return `weight` times the sum of the losses over the scored tokens. labels: (targets [micro_seqs, seq_len], weight []).

        With weight = micro batches / scored tokens in the global batch, DeepSpeed's mean over micro batches and data ranks is
        the mean over tokens, however they are spread.
        """
        self.head_sums.finish()  # no more than one part's logits wait
        targets, weight = labels
        head = [p for p in self.head_parameters if p.requires_grad]
        to_steps = self.loss_share is not None and all(main_grad_of(parameter) is not None for parameter in head)
        head_sums = self.head_sums if to_steps else GradientSums()
        total, sums, largest = vocabulary_loss(
            partial(self._logits_to_score, head_sums),
            hidden,
            targets,
            head,
            vocab_size=self.vocab_size,
            first_row=self.grid.tensor_rank * self.causal.get_output_embeddings().weight.shape[0],
            group=self.grid.tensor_group,
            chunk_tokens=self.chunk_tokens,
            z_loss=self.z_loss,
            head_sums=head_sums,
            factor=weight * self.loss_share if to_steps else None,
            compiled=self.compiled,
        )
        self.loss_sums += sums.detach() * weight.double()
        torch.maximum(self.max_logit, largest.detach(), out=self.max_logit)
        # A loss that is not finite may have finite gradients (a target of probability 0). It must reach the gradient norm,
        # by which every rank judges the step; a finite one adds an exact zero.
        return total * (weight + 0.0 * total.detach())

    def _logits_to_score(self, head_sums: GradientSums | StepSums, hidden: torch.Tensor) -> torch.Tensor:
        """Run `logits` for the loss: a plain linear's weight gradient is added to the head's sums.

        Any other head's is autograd's, and added up after it.
        """
        head = self.causal.get_submodule(self.stack.head)
        defer_weight_gradients(head, head_sums)
        try:
            return self.logits(hidden)
        finally:
            defer_weight_gradients(head, None)

    @cached_property  # each micro batch's loss asks
    def head_parameters(self) -> tuple[nn.Parameter, ...]:
        """Return the ForCausalLM's parameters outside its base model; of tied weights, the one the head computes with."""
        weight = self.causal.get_output_embeddings().weight
        of_base = {id(p) for p in self.causal.get_submodule(self.stack.base).parameters()}
        return (weight, *(p for p in self.causal.parameters() if id(p) not in of_base and p is not weight))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the ForCausalLM's own forward from the final hidden states on: soft-caps and logit scales are the family's."""
        return run_head(self.causal, self.stack, hidden)


def build_stage(
    model: PlannedModel,
    grid: Grid,
    layout: Layout = NO_OPTIONS,
    *,
    seq_len: int,
    seed: int = 0,
    z_loss: float = 0.0,
    chunk_tokens: int = 2048,
    kernels: str = "none",
    torch_linears: bool = False,
    draw: bool = True,
    router_group: dist.ProcessGroup | None = None,
    late_head: float = 0.0,
) -> Stage:
    """Turn `model` into this rank's stage with its initial weights, on the CPU in fp32. One model makes one stage.

    layout: its options; the sizes are the grid's. torch_linears: torch's own products, as in oracles. draw: False where a
    checkpoint is loaded at once: weights are NaN until then. router_group: see RouterLosses. late_head: see pass_costs.
    """
    causal, stack, tensor_plan = model.causal, model.stack, model.tensor_plan
    assert tensor_plan.size == grid.tensor
    # The order matters. 1. Measure the model while it is whole.
    layers, embedding = causal.get_submodule(stack.layers), causal.get_submodule(stack.embedding)
    shapes = {name: tuple(parameter.shape) for name, parameter in causal.named_parameters()}
    placement, recomputed = placement_of(replace(layout, pipeline=grid.pipeline)), layout.recomputed_layers(len(layers))
    (costs, head), attention = layer_costs(causal, stack, seq_len), attention_costs(causal, stack, seq_len)
    all_chunks = partition_layers(costs, head, placement, layout.layers_per_stage)
    chunks = chunks_by_rank(all_chunks, placement)[grid.pipeline_rank]
    own_layers = {index: layers[index] for chunk in chunks for index in chunk}
    crossings = find_crossings(causal, stack, model.attention, all_chunks)
    # 2. Take out what is other ranks': only what is left gets memory.
    placeholders = take_out(causal, stack, crossings, chunks, first=grid.is_first_stage, last=grid.is_last_stage)
    # 3. Draw this rank's shards of the weights, and only then tie the head to them.
    held = draw_stage(causal, stack, embedding, holdings(tensor_plan, model.experts, grid), grid, seed if draw else None)
    # 4. Route plain linears' products and fuse the work between them, before forwards are wrapped.
    stores = route_work(causal, own_layers, chunks, placement.schedule, stack.after, by_torch=torch_linears, kernels=kernels)
    # 5. Wrap modules in the collectives of expert and of tensor parallelism.
    _connect(model, embedding, grid)
    # 6. Shard the sequence around these modules.
    if tensor_plan.blocks:
        shard_sequence(causal, stack, tensor_plan, chunks, placeholders, grid, recomputed)
    keep_less(own_layers, chunks, layout, recomputed)  # 7. Recompute MLPs by parts and whole layers, their collectives included.
    return Stage(
        model,
        grid,
        chunks,
        held=held,
        whole_shapes=shapes,
        z_loss=z_loss,
        chunk_tokens=chunk_tokens,
        compiled=kernels == "compile",
        placement=placement,
        pass_costs=pass_costs(costs, attention, head, all_chunks, recomputed, late_head),
        weight_grad_stores=stores,
        placeholders=placeholders,
        carrier=carrier_of(causal, stack, tensor_plan, chunks, all_chunks, crossings, placeholders, grid),
        own_attention=_own_attention(model, grid),
        router_losses=RouterLosses(model.routers, causal, grid, router_group) if model.routers.routers else None,
    )


def _connect(model: PlannedModel, embedding: nn.Module, grid: Grid) -> None:
    """Let modules exchange what expert and tensor ranks share, and an embedding that is whole add its gradient by rows."""
    spread_experts(model.causal, model.experts, grid)
    apply_tensor_parallel(model.causal, model.tensor_plan, model.stack, grid)
    if grid.tensor == 1 and grid.is_first_stage:
        add_rows_read(embedding)


def _own_attention(model: PlannedModel, grid: Grid) -> ContextAttention | VarlenAttention | None:
    """Let the model call an attention that works with the other context ranks, or without masks."""
    if grid.context > 1:
        groups = {"head_group": grid.head_group, "span_group": grid.span_group}
        shares = {"size": grid.context, "rank": grid.context_rank, "heads": model.head_ranks}
        own = ContextAttention(model.causal.config, model.attention, **shares, **groups)
    elif model.attention == VARLEN:
        own = VarlenAttention()
    else:
        return None
    own.attach(model.causal)
    return own
