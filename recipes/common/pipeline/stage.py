"""A pipeline stage: the Hugging Face model with the other stages' layers taken out.

The ForCausalLM is built whole without memory; layers of other stages become placeholders that hand their hidden states on, so
that indices, layer types and masks keep their meaning. A later stage puts the received activation in front of its first own
layer, so what a family does before the layers (embedding scale, learned positions, dropout) happens once, on the first stage.
Parameter names are Hugging Face names.

A folded schedule gives a rank two chunks of layers. While one of them runs, placeholders stand where the other's layers are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from recipes.common.config.placement import ONE_PASS
from recipes.common.model.decoder import TUPLE_LAYERS, Stack, find_stack
from recipes.common.model.flops import attention_costs, layer_costs
from recipes.common.model.initial_weights import build_empty, draw_weights
from recipes.common.model.linears import defer_weight_gradients, route_products
from recipes.common.model.recompute import recompute
from recipes.common.model.sharding import TensorPlan
from recipes.common.model.weight_grad_store import WeightGradStore
from recipes.common.parallel.cross_entropy import vocabulary_loss
from recipes.common.parallel.grid import Grid
from recipes.common.parallel.sequence_parallel import shard_sequence
from recipes.common.parallel.tensor_parallel import apply_tensor_parallel, plan_tensor_parallel
from recipes.common.pipeline.partition import cut_chunks, pass_costs, runs_by_rank
from recipes.common.pipeline.schedules import Costs
from recipes.common.recipe import Layout

NO_OPTIONS = Layout()


class Placeholder(nn.Module):
    """A layer or norm of another stage: hands on what it is given. Plain attributes (layer_idx, attention_type) remain."""

    def __init__(self, original: nn.Module, *, as_tuple: bool = False) -> None:
        super().__init__()
        self.as_tuple = as_tuple
        for name, value in vars(original).items():
            if not name.startswith("_") and not isinstance(value, nn.Module | torch.Tensor) and not hasattr(self, name):
                setattr(self, name, value)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor, None]:
        return (hidden_states, None) if self.as_tuple else hidden_states


class PlaceholderEmbedding(nn.Module):
    """An embedding of the first stage, seen from a later one: zeros that the received activation will replace."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.dtype = width, torch.float32

    def forward(self, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*ids.shape, self.width, dtype=self.dtype, device=ids.device)


class _Hidden:
    """What a ForCausalLM expects of its base model, with nothing but the hidden states in it."""

    def __init__(self, last_hidden_state: torch.Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, index: int) -> torch.Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


class _BaseStandIn(nn.Module):
    """Stands where the base model was while the head runs: gives back the hidden states it is given."""

    def forward(self, input_ids: None = None, inputs_embeds: torch.Tensor | None = None, **kwargs: Any) -> _Hidden:
        return _Hidden(inputs_embeds)


class _Place:
    """Where a module of one chunk is, and what stands there while another chunk runs."""

    def __init__(self, stage: Stage, name: str, stand_in: nn.Module) -> None:
        parent, _, self._child = name.rpartition(".")
        self._modules = stage.causal.get_submodule(parent)._modules
        self._own, self._stand_in = self._modules[self._child], stand_in
        if parent == stage.stack.layers:
            self._chunk = next(i for i, chunk in enumerate(stage.chunks) if int(self._child) in chunk)
        else:
            self._chunk = 0 if name in stage.stack.before else len(stage.chunks) - 1

    def fill(self, chunk: int) -> None:
        self._modules[self._child] = self._own if chunk == self._chunk else self._stand_in

    def restore(self) -> None:
        self._modules[self._child] = self._own


class Stage(nn.Module):
    """What one (pipeline, tensor) place holds, and its forward pass. Build it with `build_stage`."""

    def __init__(
        self,
        causal: PreTrainedModel,
        stack: Stack,
        tensor_plan: TensorPlan,
        grid: Grid,
        chunks: tuple[range, ...],
        *,
        whole_shapes: dict[str, tuple[int, ...]],
        z_loss: float,
        chunk_tokens: int,
        schedule: str = ONE_PASS,
        pass_costs: tuple[Costs, ...] = (),
        weight_grad_stores: tuple[WeightGradStore, ...] = (),
        stand_ins: dict[str, nn.Module] | None = None,
    ) -> None:
        """chunks: the layers of each, by index, in the model's order.

        whole_shapes: of every parameter of the whole model, by Hugging Face name.
        pass_costs: of every chunk of the model, this rank's or not.
        weight_grad_stores: where each chunk's linears put off their weight gradients to, for a schedule that makes them up.
        stand_ins: by name, what stands where a layer or norm of this rank is while another chunk than its own runs.
        """
        super().__init__()
        self.causal, self.stack, self.tensor_plan, self.chunks = causal, stack, tensor_plan, chunks
        self.own = tuple(index for chunk in chunks for index in chunk)
        self.is_first, self.is_last = grid.is_first_stage, grid.is_last_stage
        self.grid, self.z_loss, self.chunk_tokens = grid, z_loss, chunk_tokens
        self.vocab_size = causal.config.get_text_config().vocab_size
        self.whole_shapes, self.weight_grad_stores = whole_shapes, weight_grad_stores
        self.schedule, self.pass_costs = schedule, pass_costs
        self._places = [_Place(self, name, module) for name, module in (stand_ins or {}).items()]
        self.place_documents([])
        self._received: torch.Tensor | None = None
        self._sent: torch.Tensor | None = None
        # over the micro batches of a step, on the last stage: cross-entropy, log(Z)^2 and log(Z), summed and weighted
        self.register_buffer("loss_sums", torch.zeros(3, dtype=torch.float64), persistent=False)
        self.register_buffer("max_logit", torch.full((), float("-inf")), persistent=False)
        layers = causal.get_submodule(stack.layers)
        for index, chunk in enumerate(chunks):
            if not (self.is_first and index == 0):
                layers[chunk[0]].register_forward_pre_hook(self._inject, with_kwargs=True)
            if not (self.is_last and chunk is chunks[-1]):
                layers[chunk[-1]].register_forward_hook(self._capture)

    def place_documents(self, positions: Iterable[torch.Tensor]) -> None:
        """RunPosition ids [micro_seqs, seq_len] of the micro batches to come, in order; none: positions count from 0."""
        positions = list(positions)
        self._positions = [deque(positions) for _ in self.chunks]

    def hf_named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(Hugging Face name, this rank's shard). A tied head goes by the embedding's name, on every stage."""
        for name, parameter in self.causal.named_parameters():
            tied = self.stack.tied and name == f"{self.stack.head}.weight"
            yield (f"{self.stack.embedding}.weight" if tied else name), parameter

    def persistent_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, tensor) of the constants that a family's state dict holds; the same in every layout."""
        names = set(self.causal.state_dict())
        return ((name, buffer) for name, buffer in self.causal.named_buffers() if name in names)

    def forward(self, x: torch.Tensor, labels: tuple[torch.Tensor, torch.Tensor] | None = None, chunk: int = 0) -> torch.Tensor:
        """First chunk of the model: x is ids [micro_seqs, seq_len]; later ones: the hidden states that the chunk before gave.

        chunk: of this rank's. Gives the hidden states to hand on; with `labels` (the model's last chunk alone has them) the loss,
        see `loss`.
        """
        is_last = self.is_last and chunk == len(self.chunks) - 1
        base = self.causal.get_submodule(self.stack.base)
        positions = {"position_ids": self._positions[chunk].popleft()} if self._positions[chunk] else {}
        for place in self._places:
            place.fill(chunk)
        try:
            if self.is_first and chunk == 0:
                out = base(input_ids=x, use_cache=False, **positions)
            else:
                self._received = x
                for module in base.modules():
                    if isinstance(module, PlaceholderEmbedding):
                        module.dtype = x.dtype
                # only its shape and type count; what is handed on need not look like an embedding, nor hold the whole sequence
                seq_len = x.shape[1] * (self.tensor_plan.size if self.tensor_plan.blocks else 1)
                embedded = x.new_zeros(x.shape[0], seq_len, self.causal.config.get_text_config().hidden_size)
                out = base(inputs_embeds=embedded, use_cache=False, **positions)
        finally:
            self._received = None
            for place in self._places:
                place.restore()
        hidden, self._sent = (out.last_hidden_state if is_last else self._sent), None
        return hidden if labels is None else self.loss(hidden, labels)

    def loss(self, hidden: torch.Tensor, labels: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """labels: (targets [micro_seqs, seq_len], weight []): the sum over the scored tokens times `weight`.

        With weight = micro batches / scored tokens in the global batch, DeepSpeed's mean over micro batches and data ranks is
        the mean over tokens, however they are spread.
        """
        targets, weight = labels
        head = [p for p in self.head_parameters() if p.requires_grad]
        total, sums, largest = vocabulary_loss(
            self.logits,
            hidden,
            targets,
            head,
            vocab_size=self.vocab_size,
            first_row=self.grid.tensor_rank * self.causal.get_output_embeddings().weight.shape[0],
            group=self.grid.tensor_group,
            chunk_tokens=self.chunk_tokens,
            z_loss=self.z_loss,
        )
        self.loss_sums += sums.detach() * weight.double()
        torch.maximum(self.max_logit, largest.detach(), out=self.max_logit)
        # A loss that is not finite may have finite gradients (a target of probability 0). It must reach the gradient norm,
        # by which every rank judges the step; a finite one adds an exact zero.
        return total * (weight + 0.0 * total.detach())

    def head_parameters(self) -> list[nn.Parameter]:
        """Everything the ForCausalLM has beside its base model; of tied weights, what the head computes with."""
        weight = self.causal.get_output_embeddings().weight
        of_base = {id(p) for p in self.causal.get_submodule(self.stack.base).parameters()}
        return [weight, *(p for p in self.causal.parameters() if id(p) not in of_base and p is not weight)]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The ForCausalLM's own forward from the final hidden states on, so that soft-caps and logit scales are the family's."""
        modules, name = self.causal._modules, self.stack.base
        base, stand_in = modules[name], _BaseStandIn()
        for part in self.stack.layers.split(".")[1:-1]:  # some families call `self.model.decoder` rather than `self.model`
            object.__setattr__(stand_in, part, stand_in)
        modules[name] = stand_in
        try:
            return self.causal(inputs_embeds=hidden, use_cache=False).logits
        finally:
            modules[name] = base

    def _inject(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (self._received, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._received}

    def _capture(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._sent = output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True)
class PlannedModel:
    """A whole ForCausalLM on the meta device, the names of its parts, and how its parameters are sharded."""

    causal: PreTrainedModel
    stack: Stack
    tensor_plan: TensorPlan


def plan_model(config: PreTrainedConfig, layout: Layout = NO_OPTIONS, *, attention: str = "sdpa") -> PlannedModel:
    """Build the model without memory and plan its sharding over the layout's tensor ranks.

    Raises PlanError when the family cannot be sharded so; `check` has asked before any process group exists.
    """
    causal = build_empty(config, attention)
    stack = find_stack(causal)
    tensor_plan = plan_tensor_parallel(causal, stack, layout.tensor, sequence_parallel=layout.sequence_parallel)
    return PlannedModel(causal, stack, tensor_plan)


def build_stage(
    model: PlannedModel,
    grid: Grid,
    layout: Layout = NO_OPTIONS,
    *,
    seq_len: int,
    seed: int = 0,
    z_loss: float = 0.0,
    chunk_tokens: int = 2048,
    torch_linears: bool = False,
) -> Stage:
    """Turn `model` into this rank's stage with its initial weights, on the CPU in fp32. One model makes one stage.

    layout: its options; the sizes are the grid's. torch_linears: with torch's own products, as what Trifold is held against.
    """
    causal, stack, tensor_plan = model.causal, model.stack, model.tensor_plan
    assert tensor_plan.size == grid.tensor, (tensor_plan.size, grid.tensor)
    shapes = {name: tuple(parameter.shape) for name, parameter in causal.named_parameters()}
    recomputed = layout.recomputed_layers(len(causal.get_submodule(stack.layers)))
    costs, head_cost = layer_costs(causal, stack, seq_len)
    cut = cut_chunks(costs, head_cost, grid.pipeline, layout.pipeline_schedule, layout.layers_per_stage)
    by_pass = pass_costs(costs, attention_costs(causal, stack, seq_len), head_cost, cut, recomputed)
    chunks = runs_by_rank(cut, grid.pipeline)[grid.pipeline_rank]
    weights = {"seed": seed, "shards": tensor_plan.shards, "rank": grid.tensor_rank, "size": grid.tensor}
    embedding = causal.get_submodule(stack.embedding)
    stand_ins = _take_out(causal, stack, chunks, first=grid.is_first_stage, last=grid.is_last_stage)
    draw_weights(causal, causal, "", **weights)
    if grid.is_last_stage and stack.tied:
        if not grid.is_first_stage:  # the embedding was taken out, but its weight is the head's
            draw_weights(causal, embedding, stack.embedding, **weights)
        causal.get_submodule(stack.head).weight = embedding.weight
    layers = causal.get_submodule(stack.layers)
    stores = tuple(WeightGradStore() for _ in chunks) if layout.pipeline_schedule != ONE_PASS else ()
    if stores or not torch_linears:
        route_products(causal, by_torch=torch_linears)
    for chunk, store in zip(chunks, stores, strict=False):
        for index in chunk:
            defer_weight_gradients(layers[index], store)
    apply_tensor_parallel(causal, tensor_plan, stack, grid)
    if tensor_plan.blocks:
        shard_sequence(causal, stack, tensor_plan, chunks, stand_ins, grid, recomputed)
    for index in (index for chunk in chunks for index in chunk):
        if index in recomputed:
            recompute(layers[index], keep_products=layout.recompute == "selective")
    of_schedule = {
        "schedule": layout.pipeline_schedule,
        "pass_costs": by_pass,
        "weight_grad_stores": stores,
        "stand_ins": stand_ins,
    }
    of_loss = {"z_loss": z_loss, "chunk_tokens": chunk_tokens}
    return Stage(causal, stack, tensor_plan, grid, chunks, whole_shapes=shapes, **of_loss, **of_schedule)


def _take_out(
    causal: PreTrainedModel, stack: Stack, chunks: tuple[range, ...], *, first: bool, last: bool
) -> dict[str, nn.Module]:
    """Put placeholders where other ranks' layers and norms are. Gives those for this rank's own, where it has several chunks."""
    layers, stand_ins = causal.get_submodule(stack.layers), {}
    names = [f"{stack.layers}.{index}" for index in range(len(layers))]
    own = {names[index] for chunk in chunks for index in chunk}
    own |= {*(stack.before if first else ()), *(stack.after if last else ())}
    for name in (*names, *stack.before, *stack.after):
        if name not in own:
            causal.set_submodule(name, _absent(causal, stack, name))
        elif len(chunks) > 1:
            stand_ins[name] = _absent(causal, stack, name)
    if not last:
        for name, _ in list(causal.named_children()):
            if name != stack.base:  # the head, and whatever a family keeps beside it
                causal._modules[name] = None
    return stand_ins


def _absent(causal: PreTrainedModel, stack: Stack, name: str) -> nn.Module:
    module = causal.get_submodule(name)
    if name in stack.before and isinstance(module, nn.Embedding):
        return PlaceholderEmbedding(getattr(module, "embedding_dim", causal.config.get_text_config().hidden_size))
    of_layers = name.rpartition(".")[0] == stack.layers
    return Placeholder(module, as_tuple=of_layers and causal.config.model_type in TUPLE_LAYERS)
