"""What context ranks cannot share is refused by name, with what they can: sizes by arithmetic, families by a trial."""

from pathlib import Path

import pytest
from transformers import AutoConfig

from recipes.common.checks.context_checks import (
    context_head_problems,
    context_option_problems,
    context_size_problems,
    context_trial_problems,
)
from recipes.common.checks.dry_run import describe_run
from recipes.common.recipe import Batch, Layout, derive_sizes
from tests.support.tiny import tiny_config, tiny_recipe
from tools.common.forked_ranks import run_ranks


@pytest.mark.parametrize(
    ("layout", "seq_len", "problem"),
    [
        (Layout(context=3), 16, "context=3: seq_len=16 is not a multiple of it; change seq_len, or use context=1 or 2"),
        (
            Layout(context=4, tensor=2, sequence_parallel=True),
            12,
            "context=4: seq_len=12 is not a multiple of context=4 x tensor=2, which sequence_parallel=True shares it between; "
            "change seq_len, or use sequence_parallel=False",
        ),
        (
            Layout(context=4, context_heads=3),
            16,
            "context_heads=3 must be one of 1, 2 or 4 with context=4, or 0, as many as the heads allow",
        ),
        (Layout(context_heads=1), 16, "context_heads=1 with context=1: nothing is shared; leave it out"),
        (Layout(context=4, context_heads=2), 16, None),
    ],
)  # fmt: skip
def test_sizes(layout, seq_len, problem):
    assert context_option_problems(layout, seq_len) == ([problem] if problem else [])


def test_context_ranks_are_groups_of_the_data_ranks():
    assert context_size_problems(Layout(context=4), 8) == []
    assert context_size_problems(Layout(context=3), 8) == ["context=3 does not divide 8 data ranks; use context=1 or 2"]


def test_heads_and_attention():
    config = tiny_config("llama", hidden_size=192, num_attention_heads=12, num_key_value_heads=4)
    assert context_head_problems(config, Layout(context=8, tensor=2), "sdpa") == []
    (problem,) = context_head_problems(config, Layout(context=8, context_heads=4, tensor=2), "sdpa")
    assert problem.startswith("layout context_heads=4: a tensor rank's 6 heads (2 of keys and values) cannot be divided so; use ")
    assert problem.endswith("use context_heads=1 or 2, or 0")
    (problem,) = context_head_problems(config, Layout(context=2), "paged|eager")
    assert problem.startswith("layout context=2: attention='paged|eager' cannot be shared between context ranks; use attention=")
    (problem,) = context_head_problems(config, Layout(context=8), "flash_attention_2")
    assert "only 4 of its ranks divide the heads" in problem
    assert "use context=12 at most, or attention='sdpa', 'varlen', 'eager' or 'flex_attention'" in problem


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_oss", "deepseek_v3"])
def test_families_that_can_share(family):
    config = tiny_config(family) if family != "deepseek_v3" else AutoConfig.for_model(family)
    assert run_ranks(trial, 1, config, "eager", family != "gpt_oss") == [[]]


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("qwen3_next", "model_type=qwen3_next mixes tokens outside attention"),  # linear attention
        ("jamba", "model_type=jamba does not call attention through transformers' table"),  # a state space
        ("glm_moe_dsa", "a tiny glm_moe_dsa does not run with it"),  # an indexer
        ("inkling2_text", "model_type=inkling2_text: its attention is given position_bias for each head, query and key"),
        ("bloom", "model_type=bloom does not call attention through transformers' table"),  # biases by distance
    ],
)
def test_families_that_cannot_are_refused_by_name(family, reason):
    (problem,) = run_ranks(trial, 1, AutoConfig.for_model(family), "eager", False)[0]
    assert problem.startswith(f"layout context=2: {reason}")
    assert problem.endswith("use context=1")


def trial(config, attention, mask_documents):
    return context_trial_problems(config, Layout(context=2), attention, mask_documents=mask_documents)


def planted():
    """A llama whose heads know which they are: a part of them is not enough."""
    from transformers.models.llama import modeling_llama

    eager = modeling_llama.eager_attention_forward

    def faulty(module, query, *args, **options):
        out, weights = eager(module, query, *args, **options)
        return out + out.mean(dim=2, keepdim=True), weights

    modeling_llama.eager_attention_forward = faulty
    return trial(tiny_config("llama"), "eager", False)


def test_an_attention_that_needs_all_heads_is_refused():
    (problem,) = run_ranks(planted, 1)[0]
    assert "its attention needs all heads" in problem


def described(attention, layout, **fields):
    batch = Batch(seq_len=65_536, micro_seqs=1, global_seqs=4)
    recipe = tiny_recipe(Path("/nowhere"), batch=batch, attention=attention, **fields)
    return describe_run(recipe, layout, derive_sizes(recipe, layout, 4))


def test_the_dry_run_says_who_shares_and_what_masks_take():
    shared = Layout(context=4, context_heads=2)
    text = run_ranks(described, 1, "sdpa", shared)[0]
    assert "data 4 (4 context ranks share a sequence, 2 by heads x 2 by queries), recompute none" in text
    assert "1 a micro batch x 1 groups of context ranks x 4 accumulated" in text
    assert "masks       attention='sdpa' holds 1 of 1 x 32768 x 65536 elements, 2.0 GiB on each rank" in text
    assert "masks" not in run_ranks(described, 1, "sdpa", Layout(context=4))[0]  # causal, of a whole sequence
    assert "holds 1 of 1 x 65536 x 65536 elements, 16.0 GiB" in run_ranks(described, 1, "eager", Layout(context=4))[0]
