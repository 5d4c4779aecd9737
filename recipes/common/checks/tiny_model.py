"""Makes a tiny model of the same family with the same options, to try a recipe's numerics in seconds."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedConfig

from recipes.common.parallel.context_parallel import head_ranks
from recipes.common.recipe import Layout

# transformers' common names; a family's own (n_embd, ...) are found through its attribute_map
_CAPS = {
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 48,
    "ffn_hidden_size": 96,
    "ffn_dim": 96,
    "n_inner": 96,
    "word_embed_proj_dim": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 16,
    "rotary_dim": 8,
    "sliding_window": 8,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "max_position_embeddings": 128,
    "index_head_dim": 16,
    "index_n_heads": 4,
    "index_topk": 16,
}
_HEAD_DIM = 16
VOCAB_SIZE = 503  # a prime: no tensor size divides it, as with real vocabularies


def shrink(config: PreTrainedConfig, layout: Layout) -> PreTrainedConfig:
    """Return the config with small sizes that `layout` shards in the same way (heads stay grouped, or shared between ranks).

    Context ranks that divide heads count like tensor ranks.
    """
    names = dict(getattr(type(config), "attribute_map", {}))
    fields = config.to_dict()
    depth = config.num_hidden_layers
    layers = min(depth, max(4, 2 * layout.pipeline))

    def put(name: str, value: Any) -> None:
        own = names.get(name, name)
        if fields.get(own) is not None:
            fields[own] = value

    for name, cap in _CAPS.items():
        own = names.get(name, name)
        if isinstance(fields.get(own), int) and not isinstance(fields[own], bool):
            fields[own] = min(fields[own], cap)
    heads, kv_heads = _heads(config, layout.tensor * head_ranks(config, layout))
    put("num_hidden_layers", layers)
    put("num_attention_heads", heads)
    put("num_key_value_heads", kv_heads)
    # multi-head latent attention has its own widths, and keeps in head_dim the rotary one
    put("head_dim", fields["qk_rope_head_dim"] if fields.get("qk_rope_head_dim") else _HEAD_DIM)
    put("hidden_size", heads * _HEAD_DIM)
    put("vocab_size", min(config.vocab_size, VOCAB_SIZE))
    for name, value in list(fields.items()):
        if name.endswith("_token_id") and isinstance(value, int) and value >= VOCAB_SIZE:
            fields[name] = 0
        elif isinstance(value, list) and len(value) == depth:
            fields[name] = _representative(value, layers)
    for name in ("model_type", "transformers_version", "architectures", "_name_or_path", "dtype"):
        fields.pop(name, None)
    return type(config)(**fields)


def _heads(config: PreTrainedConfig, ranks: int) -> tuple[int, int]:
    """Return few heads, in the real relation to the ranks that divide them: kv heads divided stay so, fewer stay fewer."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if kv_heads == heads:
        small = ranks if ranks > 2 else 4
        return small, small
    small_kv = kv_heads if kv_heads < ranks else max(ranks, min(kv_heads, 2))
    unit = math.lcm(small_kv, ranks)
    return unit * -(-2 * small_kv // unit), small_kv


def _representative(values: list[Any], count: int) -> list[Any]:
    """Return the first `count` values, the last of them replaced by kinds that would be missing."""
    kept = values[:count]
    missing = [value for i, value in enumerate(values) if value not in kept and value not in values[:i]]
    for index, value in zip(reversed(range(count)), missing[: count - 1], strict=False):
        kept[index] = value
    return kept
