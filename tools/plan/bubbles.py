"""Says how much of a plan's step its pipeline's bubble is: by formula, and by playing the passes with the layers' costs."""

from __future__ import annotations

from recipes.common.config.ds_config import head_sums_at_once
from recipes.common.config.placement import ONE_PASS, placement_of
from recipes.common.model.flops import attention_costs
from recipes.common.parallel.cross_entropy import last_part_share
from recipes.common.pipeline.partition import partition_layers, pass_costs
from recipes.common.pipeline.schedules import Costs, finish_times, order_passes
from tools.plan.evaluate import Plan
from tools.plan.model_cases import Candidate, ModelFacts

# of a step: passes
_PASSES = ("matrices", "attention", "elementwise", "host", "head", "loss", "gradients", "tensor", "context", "expert")


def bubble_shares(facts: ModelFacts, plan: Plan) -> tuple[float, float] | None:
    """Return the bubble's share of the passes' time, by formula and simulated; None without a pipeline.

    The simulation knows what each chunk costs, the head's included, and that messages take no time.
    """
    layout = plan.candidate.layout
    if layout.pipeline == 1:
        return None
    lost = plan.parts["bubble"]
    formula = lost / (lost + sum(plan.parts[name] for name in _PASSES))
    micro_batches = facts.recipe.batch.global_seqs // (plan.candidate.micro_seqs * plan.candidate.readers)
    placement, costs = placement_of(layout), chunk_costs(facts, plan.candidate)
    span = max(finish_times(order_passes(placement, micro_batches, costs), costs))
    work = [sum(sum(costs[chunk]) for chunk in placement.chunks_of(rank)) for rank in range(placement.pipeline)]
    return formula, 1.0 - micro_batches * max(work) / span


def chunk_costs(facts: ModelFacts, candidate: Candidate) -> tuple[Costs, ...]:
    """Return the costs of every chunk's passes, as training orders them by. 1F1B computes two gradients in one pass."""
    layout, batch, (costs, head) = candidate.layout, facts.recipe.batch, facts.costs
    attention = attention_costs(facts.causal, facts.stack, batch.seq_len)
    chunks = partition_layers(costs, head, placement_of(layout), layout.layers_per_stage)
    tokens = candidate.micro_seqs * batch.seq_len // layout.context
    late = last_part_share(tokens, facts.recipe.logits_chunk_tokens) if head_sums_at_once(facts.ds_config) else 0.0
    found = pass_costs(costs, attention, head, chunks, layout.recomputed_layers(len(costs)), late)
    if layout.pipeline_schedule != ONE_PASS:
        return found
    return tuple(Costs(each.forward, each.inputs + each.weights, 0.0, each.late) for each in found)


def bubble_text(facts: ModelFacts, plan: Plan) -> str:
    shares = bubble_shares(facts, plan)
    if shares is None:
        return "no pipeline, no bubble"
    return f"bubble {shares[0]:.1%} of the passes' time by formula, {shares[1]:.1%} with the layers' costs, passes played"
