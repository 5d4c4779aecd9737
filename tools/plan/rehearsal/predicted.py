"""Says what the planner predicts of one rank's step, in the terms in which a rehearsal counts it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.common.config.ds_config import head_sums_at_once, load_ds_config, precision, zero_stage
from recipes.common.recipe import Layout, Recipe
from tools.common.devices import Device
from tools.plan.gradient_sums import sums_inside_products
from tools.plan.memory_model import StageBytes
from tools.plan.model_cases import (
    Candidate,
    ModelFacts,
    head_stage,
    read_model,
    sequence_ranks,
    summed_apart,
    time_cases,
)
from tools.plan.stage_memory import memory_case, norm_bytes, reused_bytes, stage_holds, unreduced_bytes


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Bytes that a stage holds beside its states, in the loss or in a layer's backward pass."""

    stored: float  # activations of the micro batches in flight, and factors of deferred weight gradients
    working: float = 0.0  # what the layer's backward pass adds
    loss: float = 0.0  # what the loss adds at its fullest
    reducing: float = 0.0  # buckets of ZeRO's own optimizers, and under ZeRO 2 whole gradients

    @property
    def total(self) -> float:
        return self.stored + self.working + self.loss + self.reducing


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Of one stage, with the planner's counts and none of its fitted factors, which stand for libraries and the allocator."""

    states: float  # bytes of weights, gradients that stay between micro batches, and optimizer states
    moment: Moment  # when it holds most
    products: float  # FLOPs of a step
    elementwise: float  # bytes that the layers' elementwise work moves in a step
    summed: float  # bytes that adding up gradients moves in a step, outside products
    reduced: float  # bytes that the data ranks exchange in a step, a parameter's once for each way

    @property
    def all_states(self) -> float:
        """Return the bytes of states at the peak."""
        return self.states + self.moment.reducing

    @property
    def activations(self) -> float:
        """Return the bytes of activations at the peak."""
        return self.moment.stored + self.moment.working

    @property
    def loss(self) -> float:
        """Return the loss's bytes at the peak."""
        return self.moment.loss

    @property
    def peak(self) -> float:
        return self.all_states + self.activations + self.loss


def predict(recipe: Recipe, layout: Layout, world_size: int, stage: int, micro_batches: int, device: Device) -> Prediction:
    facts = read_model(recipe, load_ds_config(recipe.deepspeed))
    data = world_size // (layout.tensor * layout.pipeline)
    candidate = Candidate(layout=layout, data=data, micro_seqs=recipe.batch.micro_seqs)
    stages = memory_case(facts, candidate, device).stages
    bytes_of: StageBytes = stages[stage]
    own, work = facts.own_layers(layout)[stage], facts.work
    row = time_cases(facts, [candidate], device)
    tokens, passes = float(row.tokens[0]), float(row.passes[0])
    on_rank = facts.rank_matrices(layout)
    matrices = 2.0 * passes * sum(on_rank[index] for index in own)
    head = 6.0 * work.head / layout.tensor if bytes_of.loss else 0.0
    params = bytes_of.weights / facts.activation_width
    unreduced = unreduced_bytes(facts, params)
    banks = 0.0 if keeps_gradients(facts.ds_config) else _bank_bytes(facts, own, layout.tensor * layout.expert)
    reducing = _bucket_bytes(facts.ds_config, params) + unreduced + banks
    return Prediction(
        states=bytes_of.states - unreduced,
        moment=max(_moments(facts, candidate, stage, reducing), key=lambda moment: moment.total),
        products=(matrices + head) * tokens * micro_batches,
        elementwise=float(row.traffic[0]) * tokens * micro_batches * len(own),
        summed=summed_apart(facts, layout, tokens, micro_batches)[stage],
        reduced=params * float(row.reduce_bytes[0]) if data > 1 else 0.0,
    )


def _moments(facts: ModelFacts, candidate: Candidate, stage: int, reducing: float) -> Iterator[Moment]:
    """Yield what a stage holds in the backward passes of each of its chunks, and in the loss."""
    chunks = facts.own_chunks(candidate.layout)[stage]
    has_loss = stage == head_stage(candidate.layout)
    for held, stored in stage_holds(facts, candidate)[stage]:
        for counts, own in zip(held.activations, chunks, strict=True):
            stored += counts * _mask_bytes(facts, candidate, own)
        yield Moment(stored=stored, working=_working_bytes(facts, candidate, chunks[held.chunk]), reducing=reducing)
        if has_loss and held.chunk == len(chunks) - 1:
            yield Moment(stored=stored, loss=_loss_bytes(facts, candidate))


def _bank_bytes(facts: ModelFacts, own: Sequence[int], ranks: int) -> float:
    """Return the bytes of the largest bank of experts in fp32, to which ZeRO's own optimizers copy its gradient; other matrices
    are small."""
    names = tuple(f"{facts.stack.layers}.{index}." for index in own)
    banks = (p.numel() for name, p in facts.causal.named_parameters() if p.ndim == 3 and name.startswith(names))
    return 4.0 * max(banks, default=0) / ranks


def _mask_bytes(facts: ModelFacts, candidate: Candidate, own: Sequence[int]) -> float:
    """Return the bytes of a micro batch's document mask: bools, and what each layer that is not computed again adds to its
    scores, in the activations' precision. `explain` does not count them."""
    if not facts.recipe.mask_documents or facts.recipe.attention != "sdpa":
        return 0.0
    again = candidate.layout.recomputed_layers(len(facts.activations))
    kept = sum(index not in again for index in own)
    return candidate.own_seqs * facts.recipe.batch.seq_len**2 * (1.0 + facts.activation_width * kept)


def _working_bytes(facts: ModelFacts, candidate: Candidate, own: Sequence[int]) -> float:
    """Return what the fullest layer's backward pass adds to what is stored: all that it computes again, and its gradients.

    Sequence parallelism gathers the input of a block and its gradient, and of both blocks where the layer runs again.
    """
    layout, layers = candidate.layout, facts.layer_bytes(candidate)
    again = layout.recomputed_layers(len(layers))
    gathered = 0.0
    if layout.sequence_parallel:
        hidden = candidate.own_seqs * facts.recipe.batch.seq_len * facts.work.hidden * facts.activation_width
        gathered = hidden * (2.0 if layout.recompute == "none" else 3.0)
    ranks, most = (layout.tensor, sequence_ranks(layout)), 0.0
    for index in own:
        saved = 0.0
        if index in again:
            saved = candidate.own_seqs * layers[index].saved.on_rank(*ranks) - reused_bytes(facts, candidate, layers[index])
        most = max(most, saved + candidate.own_seqs * max(moment.on_rank(*ranks) for moment in layers[index].working))
    return most + gathered


def _loss_bytes(facts: ModelFacts, candidate: Candidate) -> float:
    """Return the bytes of the loss at its fullest: in a chunk's backward pass, or when a head's whole gradient is scaled.

    `explain` adds the two, and a fitted factor makes up for it.
    """
    whole = candidate.own_seqs * facts.recipe.batch.seq_len
    tokens = min(facts.recipe.logits_chunk_tokens, whole)
    width, apart = facts.activation_width, not head_sums_at_once(facts.ds_config)
    head = facts.rank_params(candidate.layout)["head"] if apart else 0.0
    logits = tokens * facts.work.vocab / candidate.layout.tensor
    exponential = 0.0 if facts.recipe.kernels == "compile" else 4.0
    chunk = (exponential + width) * logits + 4.0 * head  # logits and exponentials; the head's gradient in fp32
    in_place = width == 4.0 or sums_inside_products(facts.recipe, facts.ds_config)
    scaled = (4.0 + (0.0 if in_place else width)) * head
    entering = 2.0 * width * whole * facts.work.hidden  # what enters the head, and its gradient: on every rank
    return max(chunk, scaled) + entering + norm_bytes(facts, candidate)


def keeps_gradients(ds_config: dict[str, Any]) -> bool:
    """Return whether gradients stay from step to step: those that go our way, not those of ZeRO's own optimizers."""
    return zero_stage(ds_config) <= 1


def _bucket_bytes(ds_config: dict[str, Any], params: float) -> float:
    """Return the bytes of two buckets, neither of more than the rank's parameters.

    Gradients that go our way need none.
    """
    if keeps_gradients(ds_config):
        return 0.0
    width = 4.0 if ds_config.get("communication_data_type", precision(ds_config)) == "fp32" else 2.0
    return 2.0 * width * min(ds_config.get("zero_optimization", {}).get("reduce_bucket_size", 5e8), params)
