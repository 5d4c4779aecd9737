"""`search --longest`: the longest sequence that some layout can train, and that layout, for doubled lengths one after another."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from tools.common.console import table
from tools.common.devices import GIB, Device
from tools.plan.coefficients import Coefficients
from tools.plan.evaluate import Plan, candidates, judge
from tools.plan.model_cases import ModelFacts, read_model

MOST_TOKENS = 2**24  # of a sequence: no one asks for more


@dataclass(frozen=True)
class Length:
    """A sequence length with its fastest layout."""

    seq_len: int
    global_seqs: int
    plan: Plan


def find_longest(facts: ModelFacts, gpus: int, device: Device, coefficients: Coefficients, price: float) -> list[Length]:
    """Return the recipe's length, doubled until no layout is safe in memory; each step has as many tokens as the recipe's."""
    found: list[Length] = []
    batch = facts.recipe.batch
    seq_len = batch.seq_len
    while seq_len <= MOST_TOKENS:
        seqs = max(batch.global_seqs * batch.seq_len // seq_len, 1)
        recipe = replace(facts.recipe, batch=replace(batch, seq_len=seq_len, global_seqs=seqs, micro_seqs=1, ramp=()))
        longer = read_model(recipe, facts.ds_config)
        plans, _ = judge(longer, candidates(longer, gpus, device), device, coefficients, price)
        if not plans or not plans[0].safe:
            break
        found.append(Length(seq_len, seqs, plans[0]))
        seq_len *= 2
    return found


def longest_text(facts: ModelFacts, gpus: int, device: Device, found: list[Length]) -> str:
    if not found:
        return f"{facts.recipe.name}: no layout fits {gpus} {device.name} at seq_len={facts.recipe.batch.seq_len}"
    rows = []
    for each in found:
        layout, plan = each.plan.candidate.layout, each.plan
        schedule = layout.pipeline_schedule + (f", {layout.chunks} chunks" if layout.chunks > 1 else "")
        sizes = (layout.tensor, layout.pipeline, plan.candidate.data, layout.context, layout.recompute, schedule)
        shared = "yes" if layout.sequence_parallel else "no"
        memory = f"{plan.peak[1] / GIB:.0f} ({plan.peak[0] / GIB:.0f}-{plan.peak[2] / GIB:.0f})"
        rows.append([f"{each.seq_len:,}", each.global_seqs, *sizes, shared, f"{plan.seconds:.2f}", f"{plan.mfu:.1%}", memory])
    header = ["seq_len", "global_seqs", "tensor", "pipeline", "data", "context", "recompute", "schedule", "sequence_parallel",
              "step s", "MFU", "memory GiB"]  # fmt: skip
    positions = getattr(facts.recipe.model.get_text_config(), "max_position_embeddings", None)
    longest = found[-1].seq_len
    lines = [table(rows, header), f"the longest that is safe: {longest:,} tokens (the next tried: {2 * longest:,})"]
    if positions and longest > positions:
        lines.append(f"beyond {positions:,} tokens the recipe needs a larger model.max_position_embeddings, and RoPE for it")
    return "\n".join(lines)


def longest_json(found: list[Length]) -> str:
    lengths = []
    for each in found:
        candidate, plan = each.plan.candidate, each.plan
        sizes = {**vars(candidate.layout), "data": candidate.data, "micro_seqs": candidate.micro_seqs}
        numbers = {"seconds": plan.seconds, "mfu": plan.mfu, "peak": plan.peak[1]}
        lengths.append({"seq_len": each.seq_len, "global_seqs": each.global_seqs, **sizes, **numbers})
    return json.dumps({"longest": found[-1].seq_len if found else None, "lengths": lengths})
