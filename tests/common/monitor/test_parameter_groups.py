"""Every parameter of every family that ships with transformers' usual names lands in its part."""

import pytest

from recipes.common.model.initial_weights import build_empty
from recipes.common.monitor.parameter_groups import PARTS, group_of
from tests.support.tiny import tiny_config


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.embed_tokens.weight", (None, "embedding")),
        ("model.layers.0.self_attn.q_proj.weight", (0, "q")),
        ("model.layers.11.self_attn.k_proj.bias", (11, "k")),
        ("model.layers.3.self_attn.v_proj.weight", (3, "v")),
        ("model.layers.3.self_attn.o_proj.weight", (3, "o")),
        ("model.layers.3.self_attn.q_norm.weight", (3, "norm")),
        ("model.layers.3.mlp.gate_proj.weight", (3, "mlp_in")),
        ("model.layers.3.mlp.up_proj.weight", (3, "mlp_in")),
        ("model.layers.3.mlp.down_proj.weight", (3, "mlp_out")),
        ("model.layers.3.mlp.gate.weight", (3, "router")),
        ("model.layers.3.mlp.experts.gate_up_proj", (3, "mlp_in")),
        ("model.layers.3.mlp.experts.down_proj_bias", (3, "mlp_out")),
        ("model.norm.weight", (None, "norm")),
        ("lm_head.weight", (None, "head")),
        ("transformer.h.7.attn.c_attn.weight", (7, "qkv")),
        ("transformer.h.7.attn.c_proj.weight", (7, "o")),
        ("transformer.h.7.mlp.c_proj.weight", (7, "mlp_out")),
        ("transformer.h.2.self_attention.dense.weight", (2, "o")),
        ("gpt_neox.layers.2.attention.dense.bias", (2, "o")),
        ("model.layers.1.self_attn.dense.weight", (1, "o")),
        ("backbone.layers.1.mixer.A_log", (1, "other")),
    ],
)
def test_part_of_a_name(name, group):
    assert group_of(name) == group


FAMILIES = ("llama", "qwen3", "mixtral", "qwen3_moe", "gpt2", "gpt_neox", "bloom", "phi", "gemma2", "olmo2", "gpt_oss",
            "deepseek_v3", "opt", "stablelm", "starcoder2", "granite", "cohere", "mpt", "gptj")  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_no_parameter_of_a_usual_family_is_unknown(family):
    causal = build_empty(tiny_config(family), "eager")
    parts = {name: group_of(name)[1] for name, _ in causal.named_parameters()}
    unknown = [name for name, part in parts.items() if part == "other" and not name.endswith(".sinks")]
    assert set(parts.values()) <= set(PARTS)
    assert unknown == []
    assert {"embedding", "o", "mlp_in", "mlp_out"} <= set(parts.values())
    matrices = {name: p for name, p in causal.named_parameters() if p.ndim > 1}
    assert not [name for name in matrices if parts[name] == "norm"]
