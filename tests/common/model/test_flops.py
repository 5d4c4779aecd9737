"""FLOPs: the formula against torch's own counter on models that run, published figures, and the verb that prints them."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from recipes.common.model.decoder import find_stack
from recipes.common.model.flops import LayerWork, conventions, forward_flops, model_work
from recipes.common.model.initial_weights import build_empty
from tests.support.small_runs import call
from tests.support.tiny import tiny_config
from tools.common.forked_ranks import run_ranks

_LATENT = {
    "head_dim": 8, "num_key_value_heads": 4, "q_lora_rank": 32,
    "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "n_routed_experts": 4, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
FAMILIES = {
    "llama": {},  # grouped queries, gated MLP
    "gpt2": {"tie_word_embeddings": True},  # packed projections, tied head, learned positions
    "gemma3_text": {},  # windows in some layers
    "mixtral": {},  # experts in banks
    "qwen3_moe": {},  # experts, norms on heads
    "deepseek_v3": _LATENT,  # queries and values of different widths, one dense layer, shared experts
    "gpt_neox": {},
    "olmo2": {},
}
SEQ_LEN = 32


def _counted(family, fields):
    """(FLOPs a token that torch counts in a forward and backward pass, ours with the whole square of scores)."""
    config = tiny_config(family, **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.randint(3, 100, (2, SEQ_LEN)), use_cache=False).logits.square().sum().backward()
    causal = build_empty(config, "eager")
    work = model_work(causal, find_stack(causal))
    scores = 2.0 * sum(layer.scores * SEQ_LEN for layer in work.layers)  # eager computes those outside a window too
    matrices, _, head = forward_flops(work, SEQ_LEN, causal=False)
    return counter.get_total_flops() / (2 * SEQ_LEN), 3 * (matrices + scores + head), work.params, causal.num_parameters()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_formula_gives_what_torch_counts(family):
    (counted, ours, params, expected_params) = run_ranks(_counted, 1, family, FAMILIES[family])[0]
    assert ours == counted
    assert params == expected_params


def _causal_half():
    """Key positions that the mask leaves, counted one by one."""
    found = {}
    for name, layer in (
        ("full", LayerWork(matrices=1.0, scores=1.0)),
        ("window", LayerWork(matrices=1.0, scores=1.0, window=64)),
        ("chunk", LayerWork(matrices=1.0, scores=1.0, chunk=128)),
    ):
        i, j = torch.arange(512).view(-1, 1), torch.arange(512)
        mask = j <= i
        if layer.window:
            mask &= i - j < layer.window
        if layer.chunk:
            mask &= i // layer.chunk == j // layer.chunk
        found[name] = (layer.keys(512, causal=True), mask.sum().item() / 512)
    return found


def test_the_causal_half_is_what_the_mask_leaves():
    for ours, counted in run_ranks(_causal_half, 1)[0].values():
        assert 0 < counted - ours <= 0.5  # the half counts half of the diagonal


def _llama_conventions():
    causal = build_empty(tiny_config("llama"))
    work = model_work(causal, find_stack(causal))
    return {name: value for name, (value, _) in conventions(work, SEQ_LEN).items()}, work


def test_conventions_differ_by_what_their_names_say():
    found, work = run_ranks(_llama_conventions, 1)[0]
    hidden, layers, vocab = 64, 4, 131
    scores = 3 * 2 * 2 * hidden * SEQ_LEN * layers  # QK and AV, 2 FLOPs each, forward and backward, the whole square
    assert found["full_attention"] - found["ours"] == scores / 2
    assert found["6n"] == 6 * work.params
    assert found["palm_mfu"] - found["6n"] == scores
    assert found["palm_mfu"] - found["no_embedding"] == 6 * hidden * vocab
    assert found["hfu_selective"] - found["ours"] == scores / 2 / 3
    assert found["hfu_full"] - found["ours"] == (found["ours"] - 6 * hidden * vocab) / 3


def test_published_figures_reproduce():
    called = call("throughput", "flops", "--published", "--json")
    assert called.code == 0
    assert len(called.json["figures"]) == 9
    assert all(abs(figure["difference"]) <= 0.005 for figure in called.json["figures"])


def test_the_verb_names_the_convention_it_uses():
    called = call("throughput", "flops", "recipes/llama_1b.py", "--seq-len", 8192, "--json")
    found = called.json
    assert found["used"] == "ours" and found["params"] == 1_235_814_400
    layer = 2048 * (2048 + 2 * 512 + 2048 + 3 * 8192)  # q, k and v, o, gated MLP
    by_hand = 6 * (16 * (layer + 2048 * 8192) + 2048 * 128_256)  # causal half: 2 x 2048 a key, 4096 keys
    assert found["conventions"]["ours"]["flops_per_token"] == by_hand
    text = call("throughput", "flops", "recipes/llama_1b.py").out
    assert "ours (used)" in text and "Megatron-LM" in text


@pytest.mark.parametrize(
    "flags, part",
    [
        (["flops"], "RECIPE"),
        (["flops", "recipes/none.py"], "no such file"),
        (["flops", "recipes/llama_1b.py", "--seq-len", "0"], "--seq-len=0"),
    ],
)
def test_a_mistake_is_exit_2(flags, part):
    called = call("throughput", *flags)
    assert called.code == 2 and part in called.err and "Traceback" not in called.err
