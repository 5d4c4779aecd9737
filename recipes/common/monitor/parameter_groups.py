"""Assigns a parameter to its part of the decoder by its Hugging Face name, for grouping and drawing statistics.

Names match whole components from the end ("mlp.c_proj", then "c_proj"), never a piece of one. A name that no entry knows is
"other" (the mixers of state-space layers, for one): it is still measured, under its own name.
"""

from __future__ import annotations

PARTS = ("embedding", "q", "k", "v", "qkv", "o", "mlp_in", "mlp_out", "norm", "router", "head", "other")

_NAMES: dict[str, str] = {
    "embedding": (
        "embed_tokens wte wpe word_embeddings position_embeddings embed_positions embed_in embeddings tok_embeddings "
        "word_embedding tokens_embed positions_embed embed_tokens_per_layer position_embedding w input_embedding"
    ),
    "q": "q_proj q_a_proj q_b_proj project_q Wq query q_lin query_proj",
    "k": "k_proj project_k Wk key k_lin key_proj",
    "v": "v_proj project_v Wv value v_lin value_proj",
    # several of q, k and v in one tensor; also the compressed key and value of latent attention
    "qkv": "qkv_proj query_key_value c_attn Wqkv in_proj_qkv kv_proj kv_a_proj_with_mqa kv_b_proj attn.qkv",
    "o": (
        "o_proj attn.c_proj self_attention.dense attention.dense self_attn.dense multi_head_attention.dense attention_out "
        "self_attn.out_proj attn.out_proj attention.out_proj attn.Wo attention.output.dense attn.attention.out_proj"
    ),
    "mlp_in": (
        "gate_proj up_proj gate_up_proj gate_up_proj_bias fc1 c_fc dense_h_to_4h fc_in w1 w3 Wi w_0 w_1 input_linear mlp.0 "
        "intermediate.dense ff.0 ffn.up_proj"
    ),
    "mlp_out": ("down_proj down_proj_bias fc2 mlp.c_proj dense_4h_to_h fc_out w2 w_out output_linear mlp.Wo output.dense ff.2"),
    "norm": (
        "norm input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm q_norm k_norm "
        "q_layernorm k_layernorm q_a_layernorm kv_a_layernorm q_a_norm kv_norm o_norm ln_1 ln_2 ln_f ln_3 ln1 ln2 ln "
        "layernorm layernorm1 layernorm2 layer_norm layer_norm1 layer_norm2 LayerNorm final_layernorm final_layer_norm "
        "final_norm self_attn_layer_norm norm_1 norm_2 norm_f post_layernorm pre_ff_layernorm operator_norm ffn_norm attn_norm "
        "mlp_norm attention_norm embed_norm embedding_norm word_embeddings_layernorm layernorm_embedding post_mlp_layernorm "
        "pre_mlp_layernorm post_self_attn_layernorm attention_layernorm feedforward_layernorm attn_sub_norm ffn_sub_norm "
        "post_norm1 post_norm2 dt_layernorm b_layernorm c_layernorm temporal_pre_norm channel_pre_norm output_layernorm "
        "layernorm_before_attention layernorm_before_ffn pre_ln out_norm ln_out k_rope_only_layernorm post_operator_norm "
        "post_ffn_norm norm_ffn norm_mlstm post_per_layer_input_norm per_layer_projection_norm router_norm multihead_norm"
    ),
    "router": "gate router router.layer router.classifier shared_expert_gate e_score_correction_bias expert_bias",
    "head": "lm_head embed_out output_projection",
}
_PART_OF = {name: part for part, names in _NAMES.items() for name in names.split()}


def group_of(name: str) -> tuple[int | None, str]:
    """Return (layer or None, one of PARTS) of a parameter: "model.layers.3.self_attn.q_proj.weight" is (3, "q").

    A bias belongs with its matrix. A tied head goes by the embedding's name, as everywhere.
    """
    path = name.split(".")
    layer = next((int(part) for part in path if part.isdigit()), None)
    owner = path[:-1] if path[-1] in ("weight", "bias") else path
    for length in (3, 2, 1):
        part = _PART_OF.get(".".join(owner[-length:])) if len(owner) >= length else None
        if part is not None:
            return layer, part
    return layer, "other"
