"""Describes a recipe's model to the planner: parameter counts, partition, measured activations, and what its time depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil
from typing import Any

import numpy as np
import torch

from recipes.common.config.ds_config import head_sums_at_once, precision, sums_gradients_by_step, zero_stage
from recipes.common.config.placement import Placement, placement_of
from recipes.common.model.decoder import Stack, find_stack
from recipes.common.model.flops import ModelWork, layer_costs, model_work, training_flops
from recipes.common.model.initial_weights import build_empty
from recipes.common.model.routers import plan_routers
from recipes.common.pipeline.partition import chunks_by_rank, partition_layers
from recipes.common.pipeline.stage import NO_ROUTER_LOSS
from recipes.common.recipe import FP8, Layout, Recipe
from tools.common.console import UsageError
from tools.common.devices import Device
from tools.plan.activations import ModelBytes, model_activations
from tools.plan.context_cost import ContextCost, context_cost
from tools.plan.fp8_cost import Fp8Cost, fp8_cost
from tools.plan.gradient_sums import (
    HEAD_SUMMED,
    ROW_SUMMED,
    SUM_READ,
    SUMMED_APART,
    SUMMED_INSIDE,
    sums_inside_products,
)
from tools.plan.layer_log import Bytes, LayerBytes, Work, mean_work
from tools.plan.layer_products import Product, layer_products
from tools.plan.rank_params import rank_matrices, rank_params
from tools.plan.schedule_formulas import bubble_share, exposed_messages, gradient_laps
from tools.plan.tensor_sums import tensor_sums
from tools.plan.time_model import Cases

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_LOGIT_BYTES = {"none": 30.0, "compile": 10.0}  # a logit, in the loss, as a rehearsal counts them
_FP32_REDUCE = 4.0  # bytes a parameter: gradients are reduced in fp32, weights gathered in their own precision


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout with its data-parallel size and micro batch."""

    layout: Layout
    data: int
    micro_seqs: int

    @property
    def own_seqs(self) -> float:
        """Return how many sequences' tokens of a micro batch one rank computes: a context rank has a part of each."""
        return self.micro_seqs / self.layout.context

    @property
    def readers(self) -> int:
        """Return how many data ranks read different sequences."""
        return self.data // self.layout.context

    @property
    def gpus(self) -> int:
        return self.layout.tensor * self.layout.pipeline * self.data


@dataclass(frozen=True)
class ModelFacts:
    """The properties of a recipe's model that planning needs; read once, for every layout."""

    recipe: Recipe
    ds_config: dict[str, Any]
    causal: Any
    stack: Stack
    work: ModelWork
    activations: tuple[LayerBytes, ...]  # by layer
    after_layers: Bytes  # of the final norm, until the loss's backward pass
    by_mlp_tokens: dict[int, tuple[LayerBytes, ...]] = field(default_factory=dict)  # of `layer_bytes`
    params_by_ranks: dict[tuple[int, str, int], dict[str, float] | str] = field(default_factory=dict)  # results of `rank_params`
    matrices_by_ranks: dict[tuple[int, str], list[float]] = field(default_factory=dict)  # results of `rank_matrices`
    products_by_ranks: dict[tuple[int, str, int], dict[Product, float]] = field(default_factory=dict)  # of `products`
    fp8_by_tensor: dict[int, Fp8Cost] = field(default_factory=dict)  # results of `fp8_cost`
    chunks_by_pipeline: dict[tuple[Placement, tuple[int, ...]], list[tuple[range, ...]]] = field(default_factory=dict)

    @cached_property
    def flops(self) -> float:
        """FLOPs of a token, forward and backward."""
        return training_flops(self.work, self.recipe.batch.seq_len)

    @cached_property
    def routed(self) -> float:
        """Return how many experts of the mean layer a token chooses."""
        plan = plan_routers(self.causal, self.stack, NO_ROUTER_LOSS)
        return plan.chosen * len(plan.routers) / len(self.work.layers)

    @cached_property
    def costs(self) -> tuple[list[float], float]:
        """The cost of each layer and of the head, as the partition counts them."""
        return layer_costs(self.causal, self.stack, self.recipe.batch.seq_len)

    @cached_property
    def mean_work(self) -> tuple[Work, Work]:
        """What the mean layer's forward and backward pass start for one sequence."""
        return mean_work([each.forward for each in self.activations]), mean_work([each.backward for each in self.activations])

    @cached_property
    def heads(self) -> int:
        return getattr(self.recipe.model.get_text_config(), "num_attention_heads", None) or 1

    @cached_property
    def head_dim(self) -> int:
        return getattr(self.recipe.model.get_text_config(), "head_dim", None) or self.work.hidden // self.heads

    @cached_property
    def mean_scores(self) -> float:
        """The mean layer's multiply-adds a token in attention's products; eager attention computes the masked half as well."""
        seq_len, causal = self.recipe.batch.seq_len, self.recipe.attention != "eager"
        return sum(layer.scores * layer.keys(seq_len, causal=causal) for layer in self.work.layers) / len(self.work.layers)

    def context_cost(self, layout: Layout) -> ContextCost:
        return context_cost(self.recipe.model, layout, self.recipe.batch.seq_len, self.head_dim)

    def fp8_cost(self, tensor: int) -> Fp8Cost:
        """Return what products in fp8 cost on each of `tensor` ranks, kept; nothing without them."""
        if self.recipe.precision != FP8:
            return Fp8Cost()
        if tensor not in self.fp8_by_tensor:
            self.fp8_by_tensor[tensor] = fp8_cost(self.causal, self.stack, tensor)
        return self.fp8_by_tensor[tensor]

    @property
    def activation_width(self) -> int:
        """Bytes of an activation's element."""
        return _DTYPES[precision(self.ds_config)].itemsize

    def layer_bytes(self, candidate: Candidate) -> tuple[LayerBytes, ...]:
        """Return what each layer holds of a sequence: less where MLPs run for a part of a micro batch's tokens at a time."""
        tokens = candidate.own_seqs * self.recipe.batch.seq_len
        if not 0 < candidate.layout.mlp_chunk_tokens < tokens:
            return self.activations
        part = ceil(candidate.layout.mlp_chunk_tokens / candidate.own_seqs)  # of each sequence
        if part not in self.by_mlp_tokens:
            self.by_mlp_tokens[part] = _activations(self.recipe, self.ds_config, part).layers
        return self.by_mlp_tokens[part]

    def own_chunks(self, layout: Layout) -> list[tuple[range, ...]]:
        """Return the layers of each stage's chunks, partitioned as in training."""
        placement = placement_of(layout)
        if (key := (placement, layout.layers_per_stage)) not in self.chunks_by_pipeline:
            costs, head = self.costs
            chunks = partition_layers(costs, head, placement, layout.layers_per_stage)
            self.chunks_by_pipeline[key] = chunks_by_rank(chunks, placement)
        return self.chunks_by_pipeline[key]

    def own_layers(self, layout: Layout) -> list[list[int]]:
        """Return each stage's layers."""
        return [[index for chunk in own for index in chunk] for own in self.own_chunks(layout)]

    def stage_loads(self, layout: Layout) -> list[float]:
        """Return each stage's cost without the head, in mean layers."""
        costs, _ = self.costs
        mean = sum(costs) / len(costs)
        return [sum(costs[i] for i in own) / mean for own in self.own_layers(layout)]

    def products(self, layout: Layout) -> dict[Product, float]:
        """Return `layer_products` of a layout's sizes, kept."""
        if (key := (layout.tensor, layout.experts, layout.expert)) not in self.products_by_ranks:
            self.products_by_ranks[key] = layer_products(self.causal, self.stack, layout)
        return self.products_by_ranks[key]

    def rank_params(self, layout: Layout) -> dict[str, float] | str:
        """Return `rank_params` of a layout's sizes, kept."""
        if (key := (layout.tensor, layout.experts, layout.expert)) not in self.params_by_ranks:
            self.params_by_ranks[key] = rank_params(self.causal, self.stack, layout)
        return self.params_by_ranks[key]

    def rank_matrices(self, layout: Layout) -> list[float]:
        """Return `rank_matrices` of a layout's sizes, kept."""
        if (key := (layout.tensor, layout.experts)) not in self.matrices_by_ranks:
            self.matrices_by_ranks[key] = rank_matrices(self.causal, self.stack, layout)
        return self.matrices_by_ranks[key]


def read_model(recipe: Recipe, ds_config: dict[str, Any]) -> ModelFacts:
    """Build the model without memory and measure it. Raises UsageError when it cannot be built or run."""
    try:
        causal = build_empty(recipe.model, recipe.attention)
        stack = find_stack(causal)
        activations = _activations(recipe, ds_config)
    except Exception as error:  # a family's own code may raise anything
        raise UsageError(f"recipe {recipe.name!r}: model={type(recipe.model).__name__}: {error}") from error
    return ModelFacts(recipe, ds_config, causal, stack, model_work(causal, stack), activations.layers, activations.after)


def _activations(recipe: Recipe, ds_config: dict[str, Any], mlp_tokens: int = 0) -> ModelBytes:
    kind = {"dtype": _DTYPES[precision(ds_config)], "attention": recipe.attention, "kernels": recipe.kernels}
    return model_activations(recipe.model, seq_len=recipe.batch.seq_len, mlp_tokens=mlp_tokens, **kind)


def stage_params(facts: ModelFacts, layout: Layout) -> list[float]:
    """Return the parameters of each stage on one tensor rank. A tied head counts once where the embedding is on its stage."""
    counts, head = facts.rank_params(layout), head_stage(layout)
    params = [sum(counts[str(i)] for i in own) for own in facts.own_layers(layout)]
    params[0] += counts["embedding"]
    params[head] += counts["norm"] + (0.0 if facts.stack.tied and head == 0 else counts["head"])
    return params


def sequence_ranks(layout: Layout) -> int:
    """Return over how many ranks sequence parallelism shards what lies between blocks."""
    return layout.tensor if layout.sequence_parallel else 1


def time_cases(facts: ModelFacts, candidates: Sequence[Candidate], device: Device) -> Cases:
    """Return one row a candidate for the time model."""
    rows = [_layout_row(facts, candidate) for candidate in candidates]
    columns = {name: np.array([row[name] for row in rows], dtype=float) for name in rows[0]}
    inside = sums_inside_products(facts.recipe, facts.ds_config)
    columns |= _product_columns([facts.products(candidate.layout) for candidate in candidates], inside)
    columns |= {name: np.full(len(rows), float(value)) for name, value in _model_row(facts, device).items()}
    shapes = [(facts.work.hidden, facts.heads, facts.recipe.batch.seq_len, c.layout.tensor, c.own_seqs) for c in candidates]
    return Cases(**columns, keys=shapes)


def _model_row(facts: ModelFacts, device: Device) -> dict[str, float]:
    """Return the fields that do not depend on the layout: the mean layer, the data ranks' exchange, the GPU."""
    work, count = facts.work, len(facts.work.layers)
    stage, kind = zero_stage(facts.ds_config), precision(facts.ds_config)
    zero_3 = stage == 3
    half = device.product_rate(kind)
    fused = facts.recipe.attention != "eager"
    in_fp8 = facts.fp8_cost(1).multiplied / (sum(layer.matrices for layer in work.layers) / count)
    of_layers = 1.0 / (in_fp8 / device.product_rate(FP8) + (1.0 - in_fp8) / half) if in_fp8 else half
    return {
        "hidden": work.hidden,
        "attention_rate": device.peak(kind) * device.flash if fused else half,
        "misaligned": facts.head_dim % 8 > 0,
        "head": work.head,
        "layers": count,
        "logit_bytes": _LOGIT_BYTES[facts.recipe.kernels],
        "reduce_bytes": _FP32_REDUCE + (0.0 if zero_3 else facts.activation_width),
        "gather_bytes": 2.0 * facts.activation_width if zero_3 else 0.0,
        "beside_backward": _FP32_REDUCE if stage == 1 else 0.0,
        "beside_forward": facts.activation_width if stage in (1, 2) else 0.0,
        "overlapped": zero_3,
        "rate": of_layers,
        "rate_half": half,
        "units": device.units,
        "bandwidth": device.bandwidth,
        "link": device.link,
        "network": device.network,
        "node": device.node,
    }


def _layout_row(facts: ModelFacts, candidate: Candidate) -> dict[str, float]:
    """Return the fields that depend on the layout."""
    layout, batch = candidate.layout, facts.recipe.batch
    repeated = _repeated_share(layout)
    passes = 3.0 + (0.0 if layout.recompute == "selective" else repeated)  # selective recomputation repeats no products
    products_again = passes - 3.0
    forward, backward = facts.mean_work
    moved = (1.0 + repeated) * forward.moved.on_rank(layout.tensor, sequence_ranks(layout))
    moved += backward.moved.on_rank(layout.tensor, sequence_ranks(layout))
    tokens, casts = candidate.own_seqs * batch.seq_len, facts.fp8_cost(layout.tensor)
    loads, head, cost = facts.stage_loads(layout), head_stage(layout), facts.context_cost(layout)
    of_slice = facts.activation_width / (batch.seq_len / layout.context)  # an element of a rank's slice, for each of its tokens
    copied = (2.0 + repeated) * cost.copied * of_slice
    params = max(stage_params(facts, layout))
    undivided = params if layout.expert == 1 else max(stage_params(facts, replace(layout, expert=1)))
    micro_batches = batch.global_seqs // (candidate.micro_seqs * candidate.readers)
    head_parts = max(tokens / (facts.recipe.logits_chunk_tokens or tokens), 1.0)  # of a micro batch, in the loss
    return {
        "tokens": tokens,
        "head_summed": SUMMED_INSIDE * head_parts,
        "scores": cost.work * facts.mean_scores,
        "context": layout.context,
        "expert": layout.expert,
        "routed": facts.routed * facts.work.hidden * facts.activation_width,
        "exchanged": cost.sent * of_slice,
        "traffic": moved / batch.seq_len + casts.token_bytes + casts.weight_bytes / tokens + copied,
        "kernels": (1.0 + repeated) * forward.kernels + backward.kernels,
        "attention_passes": (3.0 if facts.recipe.attention == "eager" else 3.5) + products_again,
        "passes": passes,
        "tensor": layout.tensor,
        **tensor_sums(layout, repeated, experts=facts.routed > 0),
        "data": candidate.data,
        "pipeline": layout.pipeline,
        "micro_batches": micro_batches,
        "layers_slowest": max(loads[:head] + loads[head + 1 :], default=0.0),
        "layers_last": loads[head],
        "params": params,
        "sum_bytes": max(summed_apart(facts, layout, tokens, micro_batches)) / micro_batches,
        "updated": undivided / candidate.data if zero_stage(facts.ds_config) else params,
        "bubble_share": bubble_share(placement_of(layout), micro_batches, passes),
        "messages": exposed_messages(placement_of(layout), micro_batches),
        **gradient_laps(placement_of(layout), micro_batches, passes),
        "pipe_share": sequence_ranks(layout),
    }


def summed_apart(facts: ModelFacts, layout: Layout, tokens: float, micro_batches: int) -> list[float]:
    """Return the bytes that each stage moves in a step to add up gradients, but those that products add.

    tokens: of a micro batch, on a rank.
    """
    params, head = stage_params(facts, layout), head_stage(layout)
    moved = SUMMED_APART * micro_batches - (SUM_READ if sums_gradients_by_step(facts.ds_config) else 0.0)
    if not sums_inside_products(facts.recipe, facts.ds_config):
        return [moved * count for count in params]
    inside = sum(n * p.width * p.inner * p.groups for p, n in facts.products(layout).items() if not p.bank)
    of, own = facts.rank_params(layout), facts.own_layers(layout)
    apart = [max(count - inside * len(layers), 0.0) for count, layers in zip(params, own, strict=True)]
    apart[0] -= of["embedding"]
    apart[head] -= 0.0 if facts.stack.tied and head == 0 else of["head"]
    sums = [moved * max(count, 0.0) for count in apart]
    sums[0] += ROW_SUMMED * tokens * facts.work.hidden * micro_batches
    sums[head] += 0.0 if head_sums_at_once(facts.ds_config) else HEAD_SUMMED * of["head"] * micro_batches
    return sums


def _product_columns(products: Sequence[dict[Product, float]], inside: bool) -> dict[str, np.ndarray]:
    """Return the time model's columns [candidates, shapes]; rows with fewer shapes end in products of nothing.

    inside: products of linears add up the weights' gradients.
    """
    most = max(map(len, products))
    nothing = (Product(width=1.0, inner=1.0), 0.0)
    rows = [[*of.items(), *[nothing] * (most - len(of))] for of in products]
    columns = {"widths": "width", "inners": "inner", "rows": "rows", "groups": "groups"}
    found = {name: np.array([[getattr(product, of) for product, _ in row] for row in rows]) for name, of in columns.items()}
    found["summed"] = np.array([[SUMMED_INSIDE if inside and not product.bank else 2.0 for product, _ in row] for row in rows])
    return found | {"counts": np.array([[count for _, count in row] for row in rows])}


def _repeated_share(layout: Layout) -> float:
    """Return the share of layers that is recomputed."""
    return 1.0 / layout.recompute_every if layout.recompute != "none" else 0.0


def head_stage(layout: Layout) -> int:
    placement = placement_of(layout)
    return placement.rank_of(placement.count - 1)
