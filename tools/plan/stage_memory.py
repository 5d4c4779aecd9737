"""Describes a recipe's pipeline stages to the memory model: states, activations by the passes in flight, the loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import itemgetter

from recipes.common.config.ds_config import head_sums_at_once, precision, zero_stage
from recipes.common.config.placement import ONE_PASS, placement_of
from recipes.common.recipe import AdamW
from tools.common.devices import Device
from tools.plan.held_passes import Held, held_in_backward
from tools.plan.layer_log import LayerBytes
from tools.plan.memory_model import MemoryCase, StageBytes, library_bytes, loss_bytes, state_bytes, whole_gradient_bytes
from tools.plan.model_cases import Candidate, ModelFacts, head_stage, sequence_ranks, stage_params


def memory_case(facts: ModelFacts, candidate: Candidate, device: Device) -> MemoryCase:
    """Return the bytes of every stage of a layout on one tensor rank, and of what all have in common."""
    layout, optimizer = candidate.layout, facts.recipe.optimizer
    zero_options = facts.ds_config.get("zero_optimization", {})
    weights, gradients, states = state_bytes(
        precision(facts.ds_config),
        zero_stage(facts.ds_config),
        candidate.data,
        moments=2 if isinstance(optimizer, AdamW) else int(optimizer.momentum > 0),
        offload="offload_optimizer" in zero_options,
    )
    boundary, layers = _boundary_bytes(facts, candidate), _layer_memory(facts, candidate)
    # of experts that expert ranks divide, fewer data ranks partition the states of fewer parameters
    held = stage_params(facts, layout)
    undivided = held if layout.expert == 1 else stage_params(facts, replace(layout, expert=1))
    stages = []
    for index, (own, holds) in enumerate(zip(facts.own_layers(layout), stage_holds(facts, candidate), strict=True)):
        (fullest, stored), params = max(holds, key=itemgetter(1)), held[index]
        stages.append(
            StageBytes(
                weights=weights * params, gradients=gradients * params + unreduced_bytes(facts, params),
                optimizer=states * undivided[index],
                stored=stored, working=max((layers[i].recomputed for i in own), default=0.0) + 2 * boundary,
                loss=_loss_bytes(facts, candidate) if index == head_stage(layout) else 0.0, in_flight=fullest.in_flight,
            )
        )  # fmt: skip
    libraries = _library_bytes(facts, candidate) if device.name != "CPU" else 0.0
    return MemoryCase(stages=tuple(stages), libraries=libraries + _gathered_bytes(facts), capacity=device.memory)


def unreduced_bytes(facts: ModelFacts, params: float) -> float:
    """Return the bytes of gradients that wait for their reduction, of a rank with so many parameters."""
    bucket = facts.ds_config.get("zero_optimization", {}).get("reduce_bucket_size", 5e8)
    return whole_gradient_bytes(precision(facts.ds_config), zero_stage(facts.ds_config), params, bucket)


def stage_holds(facts: ModelFacts, candidate: Candidate) -> list[list[tuple[Held, float]]]:
    """Return, of each stage, what it holds as its backward passes begin, and the bytes of its activations and factors then.

    A backward pass that defers weight gradients turns one layer's activations after another into factors, which are more where
    layers are recomputed.
    """
    layout, layers = candidate.layout, _layer_memory(facts, candidate)
    sent = _boundary_bytes(facts, candidate) if layout.pipeline > 1 else 0.0  # kept until its gradient comes
    micro_batches = facts.recipe.batch.global_seqs // (candidate.micro_seqs * candidate.readers)
    found = []
    for chunks, helds in zip(facts.own_chunks(layout), held_in_backward(placement_of(layout), micro_batches), strict=True):
        stored = [sum(layers[i].stored for i in own) + sent for own in chunks]
        factors = [sum(layers[i].factors for i in own) for own in chunks]
        grown = [_growth([layers[i] for i in own]) if layout.pipeline_schedule != ONE_PASS else 0.0 for own in chunks]
        found.append([(held, _dot(held.activations, stored) + _dot(held.factors, factors) + grown[held.chunk]) for held in helds])
    return found


def _dot(counts: Iterable[float], sizes: Iterable[float]) -> float:
    return sum(count * size for count, size in zip(counts, sizes, strict=True))


def _growth(layers: Sequence[_LayerMemory]) -> float:
    """Return what factors take more, at most, than the activations that they replace, as a layer's backward pass begins."""
    # of a layer that is not recomputed they are no more than those, within what is known of them
    grown = (each.factors - (each.stored if each.recomputed else max(each.stored, each.factors)) for each in reversed(layers[1:]))
    return max(accumulate(grown, initial=0.0))


@dataclass(frozen=True)
class _LayerMemory:
    """A layer's activation bytes of one micro batch on one tensor rank."""

    stored: float  # from its forward to its backward pass
    recomputed: float = 0.0  # all that its backward pass needs, computed again then
    factors: float = 0.0  # from its backward pass until its weights' gradients are computed


def _layer_memory(facts: ModelFacts, candidate: Candidate) -> list[_LayerMemory]:
    recomputed = candidate.layout.recomputed_layers(len(facts.activations))
    known: dict[tuple[int, bool], _LayerMemory] = {}  # layers of a kind have one object
    layers = []
    for index, saved in enumerate(facts.layer_bytes(candidate)):
        if (key := (id(saved), index in recomputed)) not in known:
            known[key] = _one_layer(facts, candidate, saved, again=index in recomputed)
        layers.append(known[key])
    return layers


def _one_layer(facts: ModelFacts, candidate: Candidate, saved: LayerBytes, *, again: bool) -> _LayerMemory:
    """A recomputed layer stores its input; selective recomputation also its products (arXiv 2205.05198, section 5)."""
    layout, ranks = candidate.layout, (candidate.layout.tensor, sequence_ranks(candidate.layout))
    kept = candidate.micro_seqs * facts.activation_width * facts.context_cost(layout).kept
    size = candidate.own_seqs * saved.saved.on_rank(*ranks) + kept
    factors = candidate.own_seqs * saved.factors.on_rank(*ranks)
    if not again:
        return _LayerMemory(size, factors=factors)
    products = _product_bytes(facts, candidate, saved) if layout.recompute == "selective" else 0.0
    stored = products + (0.0 if layout.offload_activations else _boundary_bytes(facts, candidate))
    return _LayerMemory(stored, max(size - reused_bytes(facts, candidate, saved), 0.0), factors)


def _boundary_bytes(facts: ModelFacts, candidate: Candidate) -> float:
    """Return the bytes of one micro batch's hidden states on one tensor rank."""
    width, tokens = facts.activation_width, candidate.own_seqs * facts.recipe.batch.seq_len
    return float(width) * tokens * facts.work.hidden / sequence_ranks(candidate.layout)


def _product_bytes(facts: ModelFacts, candidate: Candidate, saved: LayerBytes) -> float:
    """Return the bytes of a layer's products on one tensor rank. Row-parallel ones, attention's and the MLP's last, are whole."""
    whole = 2.0 * _row_product(facts)
    divided = max(saved.products.whole + saved.products.sharded - whole, 0.0) / candidate.layout.tensor
    return candidate.own_seqs * (whole + divided + saved.products.gathered)


def reused_bytes(facts: ModelFacts, candidate: Candidate, saved: LayerBytes) -> float:
    """Return what a layer that runs again does not hold a second time, as selective recomputation has kept it.

    Its products, but the row-parallel ones: nobody saves those, and attention's is let go when it has been added.
    """
    if candidate.layout.recompute != "selective":
        return 0.0
    return _product_bytes(facts, candidate, saved) - candidate.own_seqs * _row_product(facts)


def _row_product(facts: ModelFacts) -> float:
    """Return the bytes of a row-parallel product of a sequence."""
    return float(facts.activation_width) * facts.recipe.batch.seq_len * facts.work.hidden


def norm_bytes(facts: ModelFacts, candidate: Candidate) -> float:
    """Return what the final norm of a micro batch keeps until the loss's backward pass."""
    layout = candidate.layout
    return candidate.own_seqs * facts.after_layers.on_rank(layout.tensor, sequence_ranks(layout))


def _loss_bytes(facts: ModelFacts, candidate: Candidate) -> float:
    """Return the bytes of one chunk's logits (parallel.cross_entropy), of a gradient of the head, and of the norm before it."""
    tokens = min(facts.recipe.logits_chunk_tokens, candidate.own_seqs * facts.recipe.batch.seq_len)
    tensor, head = candidate.layout.tensor, facts.rank_params(candidate.layout)["head"]
    compiled = facts.recipe.kernels == "compile"
    apart = 0.0 if head_sums_at_once(facts.ds_config) else head
    logits = loss_bytes(tokens * facts.work.vocab / tensor, apart, facts.activation_width, compiled=compiled)
    return logits + norm_bytes(facts, candidate)


def _library_bytes(facts: ModelFacts, candidate: Candidate) -> float:
    options, layout = facts.ds_config.get("zero_optimization", {}), candidate.layout
    groups = 1 + sum(size > 1 for size in (layout.tensor, layout.pipeline, candidate.data, layout.context, layout.expert))
    bucket = max(options.get("reduce_bucket_size", 5e8), options.get("allgather_bucket_size", 5e8))
    return library_bytes(groups, bucket, 4.0)


def _gathered_bytes(facts: ModelFacts) -> float:
    """Return the bytes of 16-bit parameters that ZeRO 3 holds gathered."""
    if zero_stage(facts.ds_config) != 3:
        return 0.0
    most = facts.ds_config.get("zero_optimization", {}).get("stage3_max_live_parameters", 1e9)
    return 2.0 * min(most, facts.work.params)
