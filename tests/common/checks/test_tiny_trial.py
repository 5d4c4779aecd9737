"""The trial before a run: what would die in its first step, or learn to copy, is refused with its cure; the rest passes."""

import pytest
import torch
from transformers import (
    AutoConfig,
    BertConfig,
    ElectraConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    Phi3Config,
    RoFormerConfig,
    XLNetConfig,
)

from recipes.common.checks.tiny_trial import trial_problems
from recipes.common.parallel.tiny_model import shrink
from recipes.common.recipe import Layout
from tools.common.forked_ranks import run_ranks

# a future that is seen -> the cure, which the trial has tried
SEEING = {
    "gemma": (GemmaConfig(use_bidirectional_attention=True), "set use_bidirectional_attention=None"),
    "gemma2": (Gemma2Config(use_bidirectional_attention=True), "set use_bidirectional_attention=None"),
    "gemma3": (Gemma3TextConfig(use_bidirectional_attention=True), "set use_bidirectional_attention=None"),
    "electra": (ElectraConfig(), "set is_decoder=True"),
    "bert": (BertConfig(), "set is_decoder=True"),
    "roformer": (RoFormerConfig(), "set is_decoder=True"),
    "xlnet": (XLNetConfig(), "set attn_type='uni'"),
}
# the implementation with which it does; eager attention goes by the mask alone
ATTENTION = {"gemma": "sdpa", "gemma2": "flash_attention_2"}
# of plain and windowed attention, experts (afmoe's have frozen biases), ALiBi, convolutions and state: none sees the future
BLIND = [
    "afmoe",
    "llama",
    "gpt2",
    "gemma3_text",
    "mixtral",
    "mistral",
    "mpt",
    "falcon_mamba",
    "falcon_h1",
    "qwen3_next",
    "lfm2",
    "olmo3",
]
WRONG = {
    "kv heads": (
        LlamaConfig(num_key_value_heads=7),
        "model.num_key_value_heads=7 does not divide num_attention_heads=32",
    ),
    "numbers": (LlamaConfig(rms_norm_eps=-1.0), "the first loss of a small model of it is nan; correct rms_norm_eps=-1.0"),
    "shared": (BertConfig(is_decoder=True), "transformers gives cls.predictions.decoder.bias a second name"),
}


def _tried(configs):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    found = [trial_problems(config, ATTENTION.get(name, "eager")) for name, config in configs.items()]
    assert torch.get_rng_state().equal(before)  # the run's own draws do not depend on the trial
    return found


@pytest.fixture(scope="module")
def found():
    configs = {name: config for name, (config, _) in (SEEING | WRONG).items()}
    configs |= {name: AutoConfig.for_model(name) for name in BLIND}
    return dict(zip(configs, run_ranks(_tried, 1, configs)[0], strict=True))


@pytest.mark.parametrize("family", BLIND)
def test_a_causal_family_passes(found, family):
    assert found[family] == []


@pytest.mark.parametrize("family", SEEING)
def test_a_family_that_sees_the_future_is_refused_with_the_cure(found, family):
    (line,) = [line for line in found[family] if "sees the future" in line]
    config, cure = SEEING[family]
    assert line.startswith(f"model={type(config).__name__} sees the future: ") and line.endswith(cure)


@pytest.mark.parametrize("name", WRONG)
def test_what_would_end_the_run_is_told_before(found, name):
    config, part = WRONG[name]
    (line,) = [line for line in found[name] if part in line]
    assert line.startswith(f"model={type(config).__name__}")


def test_a_small_model_keeps_the_proportions():
    def small(config, tensor=1):
        return shrink(config, Layout(tensor=tensor))

    for config, tensor in ((LlamaConfig(num_key_value_heads=7), 1), (LlamaConfig(num_key_value_heads=24), 2)):
        tiny = small(config, tensor)
        assert tiny.num_attention_heads % tiny.num_key_value_heads and tiny.num_attention_heads % tensor == 0
    assert small(LlamaConfig(pad_token_id=32_001)).pad_token_id == 504  # beyond a vocabulary of 503, as it was
    ids = small(LlamaConfig(bos_token_id=31_000, eos_token_id=31_001, pad_token_id=31_001))
    assert ids.pad_token_id == ids.eos_token_id != ids.bos_token_id < 503
    factors = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    long = small(Phi3Config(rope_parameters=factors | {"original_max_position_embeddings": 4096}))
    assert len(long.rope_parameters["long_factor"]) == 8
