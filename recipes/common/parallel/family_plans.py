"""Keeps the tensor-parallel plans of families that transformers gives none, a few lines each.

Patterns are relative to the base model; `*` is a layer's index. A pattern that begins with `?` may match nothing: only some
configs of its family have such a module. What no pattern names is whole on every tensor rank, and the dry run says so.

Two shapes of attention. Where a rank's rows of the projections are whole heads, its heads attend alone, and the attributes of
`BUILT_IN_DIVIDE` become the rank's own. Where queries, keys and values are packed in another order, are mixed or normed across
heads, or meet biases by head, the projections are sharded, but what they give is gathered and every rank attends with all heads.
"""

from __future__ import annotations


def block(path: str, columns: str, rows: str, *, gathered: bool = False) -> dict[str, str]:
    """Return the plan of a block: its projections, by names, and what reads their outputs."""
    column, row = ("colwise_gather_output", "rowwise_split_input") if gathered else ("colwise", "rowwise")
    return {f"{path}.{name}": column for name in columns.split()} | {f"{path}.{name}": row for name in rows.split()}


def head_norms(path: str, names: str) -> dict[str, str]:
    """Return the plan of norms that are shared by all heads."""
    return {f"{path}.{name}": "replicated_with_grad_allreduce" for name in names.split()}


def _banks(path: str) -> dict[str, str]:
    """Return the plan of two modules that call a bank of experts each: what the first gives, the second reads."""
    return {f"{path}.input_linear": "bank_gather_output", f"{path}.output_linear": "bank_split_input"}


_QKV = "q_proj k_proj v_proj"
_BART = "layers.*.self_attn"

BUILT_IN_TENSOR: dict[str, dict[str, str]] = {
    "bamba": block("?layers.*.self_attn", _QKV, "o_proj") | block("layers.*.feed_forward", "gate_proj up_proj", "down_proj"),
    "biogpt": block(_BART, _QKV, "out_proj") | block("layers.*", "fc1", "fc2"),
    "bitnet": block("layers.*.self_attn", _QKV, "o_proj", gathered=True)
    | block("layers.*.mlp", "gate_proj up_proj", "down_proj", gathered=True),
    "bloom": {"h.*.self_attention": "alibi_by_head"}
    | block("h.*.self_attention", "query_key_value", "dense")
    | block("h.*.mlp", "dense_h_to_4h", "dense_4h_to_h"),
    "codegen": block("h.*.attn", "qkv_proj", "out_proj", gathered=True) | block("h.*.mlp", "fc_in", "fc_out"),
    "ctrl": block("h.*.multi_head_attention", "Wq Wk Wv", "dense") | block("h.*.ffn", "0", "2"),
    "dbrx": block("blocks.*.norm_attn_norm.attn", "Wqkv", "out_proj", gathered=True)
    | {"blocks.*.ffn.experts": "moe_tp_experts", "blocks.*.ffn.experts.mlp": "stacked_experts"},
    "diffllama": block("layers.*.self_attn", _QKV, "o_proj", gathered=True)
    | block("layers.*.mlp", "gate_proj up_proj", "down_proj"),
    "falcon": block("h.*.self_attention", "query_key_value", "dense", gathered=True)
    | block("h.*.mlp", "dense_h_to_4h", "dense_4h_to_h"),
    "falcon_h1": block("layers.*.self_attn", _QKV, "o_proj") | block("layers.*.feed_forward", "gate_proj up_proj", "down_proj"),
    "gpt2": block("h.*.attn", "", "c_proj") | {"h.*.attn.c_attn": "packed3_colwise"} | block("h.*.mlp", "c_fc", "c_proj"),
    "gpt_bigcode": block("h.*.attn", "c_attn", "c_proj", gathered=True) | block("h.*.mlp", "c_fc", "c_proj"),
    "gpt_neo": block("h.*.attn.attention", _QKV, "out_proj") | block("h.*.mlp", "c_fc", "c_proj"),
    "gpt_neox_japanese": block("layers.*.attention", "query_key_value", "dense")
    | block("layers.*.mlp", "dense_h_to_4h", "dense_4h_to_h"),
    "gpt_oss": block("layers.*.self_attn", _QKV, "o_proj")
    | {
        "layers.*.self_attn.sinks": "colwise",
        "layers.*.mlp.experts.gate_up_proj": "rowwise",  # [experts, in, out]: gate and up alternate
        "layers.*.mlp.experts.gate_up_proj_bias": "rowwise",
        "layers.*.mlp.experts.down_proj": "colwise",
        "layers.*.mlp.experts": "biased_experts",
    },
    "gptj": block("h.*.attn", _QKV, "out_proj") | block("h.*.mlp", "fc_in", "fc_out"),
    "hunyuan_v1_dense": block("layers.*.self_attn", _QKV, "o_proj")
    | head_norms("layers.*.self_attn", "query_layernorm key_layernorm")
    | block("layers.*.mlp", "gate_proj up_proj", "down_proj"),
    # experts of its attention have projections of queries and outputs
    "jetmoe": {"layers.*.self_attention.kv_proj": "colwise_gather_output"}
    | _banks("layers.*.self_attention.experts")
    | _banks("layers.*.mlp"),
    "lfm2": block("?layers.*.self_attn", _QKV, "out_proj")
    | head_norms("?layers.*.self_attn", "q_layernorm k_layernorm")
    | block("layers.*.feed_forward", "w1 w3", "w2"),
    "lfm3": block("?layers.*.self_attn", f"{_QKV} g_proj", "o_proj")
    | head_norms("?layers.*.self_attn", "q_norm k_norm")
    | block("layers.*.feed_forward", "w1 w3", "w2"),
    "mpt": block("blocks.*.attn", "Wqkv", "out_proj", gathered=True) | block("blocks.*.ffn", "up_proj", "down_proj"),
    "opt": block(f"decoder.{_BART}", _QKV, "out_proj") | block("decoder.layers.*", "fc1", "fc2"),
    "persimmon": block("layers.*.self_attn", "query_key_value", "dense")
    | head_norms("?layers.*.self_attn", "q_layernorm k_layernorm")
    | block("layers.*.mlp", "dense_h_to_4h", "dense_4h_to_h"),
    "recurrent_gemma": block("?layers.*.temporal_block", _QKV, "o_proj", gathered=True)
    | block("layers.*.mlp_block", "gate_proj up_proj", "down_proj"),
    "stablelm": block("layers.*.self_attn", _QKV, "o_proj") | block("layers.*.mlp", "gate_proj up_proj", "down_proj"),
    "xglm": block(_BART, _QKV, "out_proj") | block("layers.*", "fc1", "fc2"),
}

# Attributes that count heads or widths of the local shard.
BUILT_IN_DIVIDE: dict[str, dict[str, tuple[str, ...]]] = {
    "bloom": {"h.*.self_attention": ("num_heads",)},
    "dbrx": {"blocks.*.ffn.experts": ("ffn_hidden_size",)},
    "gpt2": {"h.*.attn": ("split_size", "num_heads")},
    "gpt_neo": {"h.*.attn.attention": ("num_heads",)},
    "gpt_neox_japanese": {"layers.*.attention": ("num_attention_heads",)},
    "gptj": {"h.*.attn": ("num_attention_heads",)},
    "opt": {f"decoder.{_BART}": ("num_heads",)},
    "persimmon": {"layers.*.self_attn": ("num_heads",)},
    "stablelm": {"layers.*.self_attn": ("num_heads", "num_key_value_heads")},
    "xglm": {_BART: ("num_heads", "embed_dim")},
}

# Plans of configs that have a field on: (field, plan, attributes to divide).
VARIANTS: dict[str, tuple[str, dict[str, str], dict[str, tuple[str, ...]]]] = {
    "stablelm": (  # a norm of its own for each head
        "qk_layernorm",
        block("layers.*.self_attn", _QKV, "o_proj", gathered=True) | block("layers.*.mlp", "gate_proj up_proj", "down_proj"),
        {},
    ),
}
