"""Says what the planner predicts of one rank's step, in the terms in which a rehearsal counts it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recipes.common.config.ds_config import load_ds_config, precision, zero_stage
from recipes.common.recipe import Layout, Recipe
from tools.common.devices import Device
from tools.plan.memory_model import StageBytes
from tools.plan.model_cases import Candidate, ModelFacts, memory_case, read_model, sequence_ranks, time_cases


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Of one stage, with the planner's counts and none of its fitted factors, which stand for libraries and the allocator."""

    states: float  # bytes of weights, gradients that stay between micro batches, and optimizer states
    reducing: float  # bytes that ZeRO's own optimizers add in a backward pass: buckets, and under ZeRO 2 whole gradients
    stored: float  # bytes of activations, of the micro batches in flight
    working: float  # bytes of a layer's backward pass
    loss_working: float  # bytes of the loss at its fullest
    products: float  # FLOPs of a step
    elementwise: float  # bytes that the layers' elementwise work moves in a step
    reduced: float  # bytes that the data ranks exchange in a step, a parameter's once for each way

    @property
    def in_loss(self) -> bool:
        """Return whether the peak is in the loss, else in a layer's backward pass."""
        return self.loss_working >= self.working + self.reducing

    @property
    def all_states(self) -> float:
        """Return the bytes of states at the peak."""
        return self.states + (0.0 if self.in_loss else self.reducing)

    @property
    def activations(self) -> float:
        """Return the bytes of activations at the peak."""
        return self.stored + (0.0 if self.in_loss else self.working)

    @property
    def loss(self) -> float:
        """Return the loss's bytes at the peak."""
        return self.loss_working if self.in_loss else 0.0

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
    matrices = 2.0 * passes * sum(work.layers[index].matrices for index in own) / layout.tensor
    head = 6.0 * work.head / layout.tensor if bytes_of.loss else 0.0
    params = bytes_of.weights / facts.activation_width
    whole_gradients = bytes_of.weights if zero_stage(facts.ds_config) == 2 else 0.0
    banks = _bank_bytes(facts, own, layout.tensor * layout.expert)
    return Prediction(
        states=bytes_of.states - whole_gradients,
        reducing=_bucket_bytes(facts.ds_config, params) + whole_gradients + banks,
        stored=bytes_of.stored + bytes_of.in_flight * _mask_bytes(facts, candidate, own),
        working=_working_bytes(facts, candidate, own),
        loss_working=_loss_bytes(facts, candidate) if bytes_of.loss else 0.0,
        products=(matrices + head) * tokens * micro_batches,
        elementwise=float(row.traffic[0]) * passes / 3.0 * tokens * micro_batches * len(own),
        reduced=params * float(row.reduce_bytes[0]) if data > 1 else 0.0,
    )


def _bank_bytes(facts: ModelFacts, own: Sequence[int], ranks: int) -> float:
    """Return the bytes of the largest bank of experts in fp32, in which its gradient is added up; other matrices are small."""
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
        saved = layers[index].saved.on_rank(*ranks) if index in again else 0.0
        most = max(most, saved + max(moment.on_rank(*ranks) for moment in layers[index].working))
    return candidate.own_seqs * most + gathered


def _loss_bytes(facts: ModelFacts, candidate: Candidate) -> float:
    """Return the bytes of the loss at its fullest: in a chunk's backward pass, or when the head's whole gradient is scaled.

    `explain` adds the two, and a fitted factor makes up for it.
    """
    whole = candidate.own_seqs * facts.recipe.batch.seq_len
    tokens = min(facts.recipe.logits_chunk_tokens, whole)
    head, width = facts.rank_params(candidate.layout)["head"], facts.activation_width
    logits = tokens * facts.work.vocab / candidate.layout.tensor
    exponential = 0.0 if facts.recipe.kernels == "compile" else 4.0
    chunk = (exponential + width) * logits + 4.0 * head  # logits and exponentials; the head's gradient in fp32
    scaled = (4.0 + (width if width < 4.0 else 0.0)) * head  # in place in fp32
    return max(chunk, scaled) + 2.0 * width * whole * facts.work.hidden  # what enters the head, and its gradient: on every rank


def keeps_gradients(ds_config: dict[str, Any]) -> bool:
    """Return whether gradients stay from step to step: in DeepSpeed's optimizer for bf16, not in ZeRO's own ones."""
    return precision(ds_config) == "bf16" and zero_stage(ds_config) <= 1


def _bucket_bytes(ds_config: dict[str, Any], params: float) -> float:
    """Return the bytes of two buckets, neither of more than the rank's parameters.

    DeepSpeed's optimizer for bf16 with fp32 gradients has none.
    """
    if keeps_gradients(ds_config):
        return 0.0
    width = 4.0 if ds_config.get("communication_data_type", precision(ds_config)) == "fp32" else 2.0
    return 2.0 * width * min(ds_config.get("zero_optimization", {}).get("reduce_bucket_size", 5e8), params)
