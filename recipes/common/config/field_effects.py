"""Says of every field of a recipe what a change of it changes: the one table, for resumes and for comparing two runs.

A field that is not in it counts as mathematics: whoever adds one and forgets it here is asked before a run goes on with another
value of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any


class Effect(Enum):
    """What a change of a field changes, the gravest first."""

    STATE = "what the saved state consists of"  # weights and optimizer states of other shapes, or of another kind
    MATHEMATICS = "the mathematics"  # the function, the loss, or what the optimizer's states mean
    ORDER = "the order of the data"
    COURSE = "the course of training"  # how fast the same weights learn: batch, learning rate, length
    ROUNDING = "rounding"
    SPEED = "speed"
    NOTHING = "nothing that is trained"


_BY_EFFECT = {
    Effect.STATE: """optimizer.class
        vocab_size hidden_size intermediate_size num_hidden_layers n_embd n_layer n_inner n_positions ffn_hidden_size
        moe_intermediate_size shared_expert_intermediate_size num_experts num_local_experts n_routed_experts n_shared_experts
        kv_lora_rank q_lora_rank tie_word_embeddings first_k_dense_replace""",
    Effect.MATHEMATICS: """router.loss router.coefficient router.count_ahead router.z_loss router.bias_rate router.fp32
        z_loss mask_documents precision tokenizer optimizer.betas optimizer.eps optimizer.momentum
        class model_type is_decoder is_encoder_decoder add_cross_attention pad_token_id
        num_attention_heads num_key_value_heads num_kv_heads n_head head_dim qk_head_dim qk_nope_head_dim qk_rope_head_dim
        v_head_dim multi_query new_decoder_architecture num_ln_in_parallel_attn
        max_position_embeddings original_max_position_embeddings rope_parameters rope_interleave alibi
        layer_types sliding_window use_sliding_window _sliding_window_pattern max_window_layers use_bidirectional_attention
        hidden_act hidden_activation activation activation_function swiglu_alpha swiglu_limit
        rms_norm_eps layer_norm_eps layer_norm_epsilon use_qk_norm qk_layernorm
        attention_bias mlp_bias bias qkv_bias use_qkv_bias parallel_attn use_parallel_residual
        attention_dropout hidden_dropout attn_pdrop embd_pdrop resid_pdrop
        attention_multiplier embedding_multiplier residual_multiplier logit_scale logits_scaling query_pre_attn_scalar
        scale_attn_weights scale_attn_by_inverse_layer_idx attn_logit_softcapping final_logit_softcapping
        num_experts_per_tok n_group topk_group norm_topk_prob routed_scaling_factor decoder_sparse_step mlp_only_layers
        router_aux_loss_coef router_jitter_noise num_nextn_predict_layers""",
    Effect.ORDER: "batch.seq_len seed data data.weights data.changes",
    Effect.COURSE: """steps batch.global_seqs batch.ramp
        optimizer.lr optimizer.weight_decay optimizer.decay_embeddings optimizer.clip
        schedule.class schedule.warmup_steps schedule.warmup_tokens schedule.decay_steps schedule.decay_tokens
        schedule.cooldown_steps schedule.cooldown_tokens schedule.shape schedule.min_lr
        reaction.action reaction.max_rewinds reaction.lr_factor reaction.lr_steps monitor.max_nonfinite_steps monitor.on_drift""",
    Effect.ROUNDING: """batch.micro_seqs deepspeed attention kernels determinism logits_chunk_tokens reorder_and_upcast_attn dtype
        pretraining_tp""",
    Effect.SPEED: "layouts chunk_size_feed_forward",
    Effect.NOTHING: """name num_params evaluation.every_steps evaluation.seqs
        checkpoints.every_steps checkpoints.every_minutes checkpoints.last_save_minutes checkpoints.keep_last
        checkpoints.keep_every_steps
        monitor.every_steps monitor.activations_every_steps monitor.drift_every_steps
        initializer_range transformers_version architectures _name_or_path return_dict use_cache
        output_attentions output_hidden_states output_router_logits bos_token_id eos_token_id
        problem_type id2label label2id classifier_dropout
        summary_type summary_use_proj summary_activation summary_first_dropout summary_proj_to_labels""",
}
EFFECTS = {name: effect for effect, names in _BY_EFFECT.items() for name in names.split()}
NEEDS_CONSENT = (Effect.MATHEMATICS, Effect.ORDER)  # a resume goes on with another value only where the user says so
MODEL = "model."


def effect_of(field: str) -> Effect:
    """Return what a change of a field changes: "batch.seq_len", or "model." and a field of the config, at any depth."""
    if not field.startswith(MODEL):
        return EFFECTS.get(field, Effect.MATHEMATICS)
    parts = field.removeprefix(MODEL).split(".")
    return next((EFFECTS[part] for part in reversed(parts) if part in EFFECTS), Effect.MATHEMATICS)


def flat_fields(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return field -> value of a recipe.json. `data` and `layouts` stay whole, as do lists and empty groups."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and name not in ("data", "layouts"):
            flat |= flat_fields(value, f"{name}.")
        elif name not in _NO_CHOICE and not (name.startswith(MODEL) and key == "dtype"):  # set by whoever builds the model
            flat[name] = value
    return flat


_NO_CHOICE = ("class", "batch.class", "evaluation.class", "checkpoints.class", "monitor.class", "reaction.class", "router.class")
