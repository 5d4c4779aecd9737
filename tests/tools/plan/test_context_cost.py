"""What the planner counts for context ranks is what they send and keep."""

import pytest

from recipes.common.recipe import Layout
from tests.support.small_runs import call
from tests.support.tiny import tiny_config
from tools.plan.context_cost import context_cost

LLAMA = "recipes/llama_8b_128k.py"


@pytest.mark.parametrize("tensor", [1, 2])
def test_elements_sent_and_kept(tensor):
    """Beside a message's part for the rank itself, as tests/common/parallel/test_context_parallel.py counts the whole of them."""
    config = tiny_config("llama", num_attention_heads=4, num_key_value_heads=2)
    heads, kv_heads, width, seq_len = 4 // tensor, 2 // tensor, 16, 32
    cost = context_cost(config, Layout(context=2, tensor=tensor), seq_len, width)
    of_slice = seq_len // 2 * width
    assert cost.sent == (heads + 2 * max(kv_heads, 2) + heads) * of_slice / 2  # a rank needs a key/value head of its own
    assert cost.kept == heads * of_slice + (2 * max(kv_heads, 2) - 2 * kv_heads) * of_slice
    assert cost.work == 1.0
    gathering = context_cost(config, Layout(context=2, context_heads=1, tensor=tensor), seq_len, width)
    assert gathering.sent == 2 * kv_heads * seq_len * width / 2
    assert gathering.work == 2.0


def test_context_divides_activations():
    stored = []
    for context in (1, 4):
        layout = f"tensor=2,data=4,context={context},sequence_parallel=1,recompute=full"
        facts = call("plan", "explain", layout, LLAMA, "--gpu-type", "H200", "--json").json["ranked"][0]
        stored.append(facts["memory"]["stages"][0]["stored"])
        assert (facts["parts"]["context"] > 0) == (context > 1)
    assert stored[1] == pytest.approx(stored[0] / 4)


def test_the_longest_sequence():
    found = call("plan", "search", LLAMA, "--gpus", 8, "--gpu-type", "H100", "--longest", "--json").json
    lengths = found["lengths"]
    assert found["longest"] == lengths[-1]["seq_len"] >= 131_072
    assert [entry["seq_len"] for entry in lengths] == [131_072 << i for i in range(len(lengths))]
    assert {entry["seq_len"] * entry["global_seqs"] for entry in lengths} == {131_072 * 32}
