"""Steps of the shelf's recipes on a stand-in for a GPU: NCCL's rules, waits of the host, memory, kernels and bytes of a layer."""

import pytest

from tests.rehearsal.cases import GPU, STEPS
from tests.rehearsal.rules import budget_problems, memory_problems, overlap_problems, wait_problems, work_problems
from tools.plan.rehearsal.predicted import predict
from tools.plan.rehearsal.step_summary import summarize


@pytest.mark.parametrize("variant", STEPS, ids=lambda variant: variant.name)
def test_a_step(variant, rehearsed):
    result, rehearsal = rehearsed(variant), variant.rehearsal()
    count = variant.steps[-1]
    summary = summarize(result, count)
    recipe, layout = rehearsal.recipe, rehearsal.layout
    tokens = recipe.batch.micro_seqs * recipe.batch.seq_len // layout.context
    prediction = predict(recipe, layout, variant.gpus, summary.stage, count, GPU)
    problems = [f"{problem}: {times}" for problem, times in summary.broken.items()]
    problems += [f"a number of elements depends on data: {line}" for line in summary.unanswered]
    problems += wait_problems(summary, variant.exchanges) + memory_problems(summary, prediction)
    parts = {"by_parts": bool(layout.mlp_chunk_tokens), "sums_inside": variant.deepspeed.startswith("zero1")}
    problems += work_problems(summary, prediction, compiled=variant.kernels == "compile", **parts)
    problems += budget_problems(summary, variant.budget, tokens=tokens, logits=tokens * recipe.model.vocab_size / layout.tensor)
    experts, activation = hasattr(recipe.model, "num_experts_per_tok"), 2 * tokens * recipe.model.hidden_size
    problems += overlap_problems(summary, layout, experts=experts, activation=activation) if layout.tensor > 1 else []
    assert problems == []
    skipped = {phase["name"]: phase["said"]["skipped"] for phase in result["phases"] if isinstance(phase["said"], dict)}
    assert [name for name, skip in skipped.items() if skip] == [name for name in variant.extras if name == "skip"]
