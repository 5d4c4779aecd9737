"""A recipe's model in the terms of the two models: real parameter counts, real cuts, measured activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from recipes.common.config.ds_config import precision, zero_stage
from recipes.common.config.placement import FOLDED, ONE_PASS, chunk_count, rank_of_chunk
from recipes.common.model.decoder import PlanError, Stack, find_stack
from recipes.common.model.flops import ModelWork, layer_costs, model_work, training_flops
from recipes.common.model.initial_weights import build_empty
from recipes.common.parallel.tensor_parallel import plan_tensor_parallel
from recipes.common.pipeline.partition import cut_chunks, runs_by_rank
from recipes.common.recipe import AdamW, Layout, Recipe
from tools.common.console import UsageError
from tools.common.devices import Device
from tools.plan.activations import TRAFFIC_PER_SAVED, LayerBytes, layer_activations
from tools.plan.memory_model import MemoryCase, StageBytes, library_bytes, state_bytes
from tools.plan.time_model import Cases

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_LOSS_BYTES = 14.0  # a logit of the chunk at hand: 16 bits, fp32, its exponent, its gradient in fp32 and in 16 bits
_HEAD_GRADIENT_BYTES = 10.0  # an element of the head: its gradient kept, and rescaled through fp32
_FP32_REDUCE, _GATHER = 4.0, 2.0


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout on a number of GPUs, with the micro batch it would run."""

    layout: Layout
    data: int
    micro_seqs: int

    @property
    def gpus(self) -> int:
        return self.layout.tensor * self.layout.pipeline * self.data


@dataclass(frozen=True)
class ModelFacts:
    """All that planning asks of a recipe's model; read once, for every layout."""

    recipe: Recipe
    ds_config: dict[str, Any]
    causal: Any
    stack: Stack
    work: ModelWork
    activations: tuple[LayerBytes, ...]
    splits: dict[int, dict[str, float] | str] = field(default_factory=dict)  # answers of `rank_params`, kept
    stages: dict[tuple[int, str, tuple[int, ...]], list[list[int]]] = field(default_factory=dict)  # answers of `own_layers`, kept

    @cached_property
    def flops(self) -> float:
        """A token, forward and backward."""
        return training_flops(self.work, self.recipe.batch.seq_len)

    def own_layers(self, layout: Layout) -> list[list[int]]:
        """Of every stage, in the cut that training would choose."""
        pipeline, schedule = layout.pipeline, layout.pipeline_schedule
        if (key := (pipeline, schedule, layout.layers_per_stage)) not in self.stages:
            costs, head = layer_costs(self.causal, self.stack, self.recipe.batch.seq_len)
            chunks = cut_chunks(costs, head, pipeline, schedule, layout.layers_per_stage)
            self.stages[key] = [[index for run in runs for index in run] for runs in runs_by_rank(chunks, pipeline)]
        return self.stages[key]

    def rank_params(self, tensor: int) -> dict[str, float] | str:
        """ "embedding", "head", "norm" or a layer's index as text -> parameters on one tensor rank; or why it cannot be cut."""
        if tensor not in self.splits:
            try:
                cuts = plan_tensor_parallel(self.causal, self.stack, tensor).shards
            except PlanError as error:
                self.splits[tensor] = str(error)
            else:
                self.splits[tensor] = _count(self.causal, self.stack, cuts, tensor)
        return self.splits[tensor]


def _count(causal: Any, stack: Stack, cuts: dict[str, Any], tensor: int) -> dict[str, float]:
    counts: dict[str, float] = {"embedding": 0.0, "head": 0.0, "norm": 0.0}
    first = tuple(f"{name}." for name in stack.before)
    for name, parameter in causal.named_parameters():
        size = parameter.numel() / (tensor if name in cuts else 1)
        if name.startswith(f"{stack.layers}."):
            part = name[len(stack.layers) + 1 :].partition(".")[0]
        elif name.startswith(f"{stack.head}.") and not stack.tied:
            part = "head"
        elif name.startswith((f"{stack.embedding}.", *first)):
            part = "embedding"
        else:
            part = "norm"
        counts[part] = counts.get(part, 0.0) + size
    if stack.tied:
        counts["head"] = causal.get_submodule(stack.embedding).weight.numel() / tensor
    return counts


def read_model(recipe: Recipe, ds_config: dict[str, Any]) -> ModelFacts:
    """Raises UsageError when the model cannot be built or run."""
    try:
        causal = build_empty(recipe.model, recipe.attention)
        stack = find_stack(causal)
        activations = layer_activations(
            recipe.model, seq_len=recipe.batch.seq_len, dtype=_DTYPES[precision(ds_config)], attention=recipe.attention
        )
    except Exception as error:  # a family's own code may raise anything
        raise UsageError(f"recipe {recipe.name!r}: model={type(recipe.model).__name__}: {error}") from error
    return ModelFacts(recipe, ds_config, causal, stack, model_work(causal, stack), activations)


def memory_case(facts: ModelFacts, candidate: Candidate, device: Device) -> MemoryCase:
    recipe, layout = facts.recipe, candidate.layout
    zero, half = zero_stage(facts.ds_config), precision(facts.ds_config)
    zero_options = facts.ds_config.get("zero_optimization", {})
    offload = "offload_optimizer" in zero_options
    moments = 2 if isinstance(recipe.optimizer, AdamW) else int(recipe.optimizer.momentum > 0)
    weights, gradients, optimizer = state_bytes(half, zero, candidate.data, moments=moments, offload=offload)
    counts = facts.rank_params(layout.tensor)
    micro_batches = recipe.batch.global_seqs // (candidate.micro_seqs * candidate.data)
    width = _DTYPES[half].itemsize
    shared = layout.tensor if layout.sequence_parallel else 1  # ranks that share what lies between blocks
    boundary = float(width) * candidate.micro_seqs * recipe.batch.seq_len * facts.work.hidden / shared
    layer_bytes = [candidate.micro_seqs * (layer.whole / shared + layer.cut / layout.tensor) for layer in facts.activations]
    recomputed = layout.recomputed_layers(len(facts.activations))
    stages = []
    for index, own in enumerate(facts.own_layers(layout)):
        last = index == _head_stage(layout)
        # a folded schedule fills every rank as 1F1B fills the first
        in_flight = min(layout.pipeline - (0 if layout.pipeline_schedule == FOLDED else index), micro_batches)
        params = sum(counts[str(i)] for i in own) + (counts["embedding"] if index == 0 else 0.0)
        params += (counts["norm"] + (counts["head"] if not (facts.stack.tied and index == 0) else 0.0)) if last else 0.0
        layers = [layer_bytes[i] for i in own]
        again = [i in recomputed for i in own]
        held = [boundary + (_product_bytes(facts, candidate, width, i) if layout.recompute == "selective" else 0.0) for i in own]
        kept = sum(less if repeat else size for size, less, repeat in zip(layers, held, again, strict=True))
        stages.append(
            StageBytes(
                weights=weights * params, gradients=gradients * params, optimizer=optimizer * params,
                stored=in_flight * (kept + (boundary if layout.pipeline > 1 else 0.0)),
                working=max((size for size, repeat in zip(layers, again, strict=True) if repeat), default=0.0) + 2 * boundary,
                loss=_loss_bytes(facts, candidate, counts["head"]) if last else 0.0, in_flight=in_flight,
            )
        )  # fmt: skip
    groups = 1 + sum(size > 1 for size in (layout.tensor, layout.pipeline, candidate.data))
    bucket = max(zero_options.get("reduce_bucket_size", 5e8), zero_options.get("allgather_bucket_size", 5e8))
    live = 2.0 * min(zero_options.get("stage3_max_live_parameters", 1e9), facts.work.params) if zero == 3 else 0.0
    gpu = device.name != "CPU"
    libraries = (library_bytes(groups, bucket, 4.0) if gpu else 0.0) + live
    return MemoryCase(stages=tuple(stages), libraries=libraries, capacity=device.memory)


def _product_bytes(facts: ModelFacts, candidate: Candidate, width: int, index: int) -> float:
    """What a layer's products gave. Two of them, attention's last and the MLP's, are sums to be made over the tensor ranks: each
    has them whole."""
    summed = 2.0 * width * facts.recipe.batch.seq_len * facts.work.hidden
    return candidate.micro_seqs * (summed + max(facts.activations[index].products - summed, 0.0) / candidate.layout.tensor)


def _loss_bytes(facts: ModelFacts, candidate: Candidate, head_params: float) -> float:
    """Count the logits of one chunk of tokens (parallel.cross_entropy), and the gradient of the head."""
    batch = facts.recipe.batch
    tokens = min(facts.recipe.logits_chunk_tokens, candidate.micro_seqs * batch.seq_len)
    return _LOSS_BYTES * tokens * facts.work.vocab / candidate.layout.tensor + _HEAD_GRADIENT_BYTES * head_params


def time_cases(facts: ModelFacts, candidates: Sequence[Candidate], device: Device) -> Cases:
    recipe, work = facts.recipe, facts.work
    zero, seq_len, count = zero_stage(facts.ds_config), recipe.batch.seq_len, len(work.layers)
    flash = recipe.attention != "eager"
    scores = sum(layer.scores * layer.keys(seq_len, causal=flash) for layer in work.layers) / count
    config = recipe.model.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    head_dim = getattr(config, "head_dim", None) or work.hidden // heads
    costs, _ = layer_costs(facts.causal, facts.stack, seq_len)
    mean = sum(costs) / count
    whole, cut = (sum(getattr(layer, name) for layer in facts.activations) / count for name in ("whole", "cut"))

    def column(of: Any) -> np.ndarray:
        return np.array([of(candidate) for candidate in candidates], dtype=float)

    def constant(value: float) -> np.ndarray:
        return np.full(len(candidates), float(value))

    tensor, data = column(lambda c: c.layout.tensor), column(lambda c: c.data)
    stages = [[sum(costs[i] for i in own) / mean for own in facts.own_layers(c.layout)] for c in candidates]
    with_head = [_head_stage(c.layout) for c in candidates]
    without_head = [stage[:head] + stage[head + 1 :] for stage, head in zip(stages, with_head, strict=True)]
    params = column(lambda c: _largest_stage(facts, c.layout))
    shared = column(lambda c: c.layout.tensor if c.layout.sequence_parallel else 1.0)
    repeated = column(lambda c: _repeated(c.layout))
    products_repeated = column(lambda c: 0.0 if c.layout.recompute == "selective" else _repeated(c.layout))
    # elementwise work that is repeated beside products that are not: the model counts both by `passes`
    more_traffic = (3.0 + repeated) / (3.0 + products_repeated)
    return Cases(
        tokens=column(lambda c: c.micro_seqs * seq_len),
        hidden=constant(work.hidden),
        matrices=constant(sum(layer.matrices for layer in work.layers) / count),
        scores=constant(scores),
        misaligned=constant(head_dim % 8 > 0),
        traffic=TRAFFIC_PER_SAVED * (whole / shared + cut / tensor) / seq_len * more_traffic,
        head=constant(work.head),
        passes=3.0 + products_repeated,
        tensor=tensor,
        data=data,
        pipeline=column(lambda c: c.layout.pipeline),
        micro_batches=column(lambda c: recipe.batch.global_seqs // (c.micro_seqs * c.data)),
        layers=constant(count),
        layers_dearest=np.array([max(others, default=0.0) for others in without_head]),
        layers_last=np.array([stage[head] for stage, head in zip(stages, with_head, strict=True)]),
        params=params,
        reduce_bytes=constant(_FP32_REDUCE + (0.0 if zero == 3 else _GATHER)),
        gather_bytes=constant(2 * _GATHER if zero == 3 else 0.0),
        updated=params / data if zero else params,
        overlapped=constant(zero == 3),
        bubble_share=column(_bubble_share),
        pipe_share=shared
        / column(lambda c: 2.0 if c.layout.pipeline_schedule == FOLDED else 1.0),  # a fold sends everything twice
        peak=constant(device.peak(precision(facts.ds_config))),
        peak_half=constant(device.peak(precision(facts.ds_config))),
        bandwidth=constant(device.bandwidth),
        link=constant(device.link),
        network=constant(device.network),
        node=constant(device.node),
        keys=[(work.hidden, heads, seq_len, c.layout.tensor, c.micro_seqs) for c in candidates],
    )


def _bubble_share(candidate: Candidate) -> float:
    """ZB-H1 (arXiv 2401.10241): of (p - 1)(F + B + W) it leaves (p - 1)(F + B - W); each is as long as a forward pass, and
    full recomputation adds one. Folded, a stage's pass is two, and half as much is left (`recipes.common.pipeline.schedules`)."""
    if candidate.layout.pipeline_schedule == ONE_PASS:
        return 1.0
    passes = 3.0 + (0.0 if candidate.layout.recompute == "selective" else _repeated(candidate.layout))
    return (passes - 2.0) / passes / (2.0 if candidate.layout.pipeline_schedule == FOLDED else 1.0)


def _repeated(layout: Layout) -> float:
    """The share of layers that is recomputed."""
    return 1.0 / layout.recompute_every if layout.recompute != "none" else 0.0


def _head_stage(layout: Layout) -> int:
    return rank_of_chunk(layout.pipeline_schedule, layout.pipeline, chunk_count(layout.pipeline_schedule, layout.pipeline) - 1)


def _largest_stage(facts: ModelFacts, layout: Layout) -> float:
    counts, head = facts.rank_params(layout.tensor), _head_stage(layout)
    sizes = [sum(counts[str(i)] for i in own) for own in facts.own_layers(layout)]
    sizes[0] += counts["embedding"]
    sizes[head] += counts["norm"] + (0.0 if facts.stack.tied and head == 0 else counts["head"])
    return max(sizes)
