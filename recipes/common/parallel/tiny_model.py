"""Makes a tiny model of the same family with the same options, to try a recipe's numerics in seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from transformers import PreTrainedConfig

from recipes.common.parallel.context_parallel import head_ranks
from recipes.common.recipe import WHOLE, Layout

VOCAB_SIZE = 503  # a prime: no tensor size divides it, as with real vocabularies
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
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "zero_expert_num": 2,
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
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "max_position_embeddings": 128,
    # state-space layers; their heads follow from these
    "mamba_d_state": 16,
    "ssm_state_size": 16,
    "state_size": 16,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "index_head_dim": 16,
    "index_n_heads": 4,
    "index_topk": 16,
    # embeddings for each layer
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 16,
}
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_HEAD_DIM = 16
_WIDEST = 128  # hidden states of a model that counts as tiny


_DEPTH = 2  # layers of `shallow`


def field_of(config: PreTrainedConfig, name: str) -> Any:
    """Return a field by transformers' common name; None without one, or where it may differ between layers."""
    try:
        return getattr(config, name, None)
    except Exception:  # heterogeneous families refuse to answer for all layers at once
        return None


def is_tiny(config: PreTrainedConfig) -> bool:
    """Return whether a config is small enough to be tried as it is: to shrink it again might not fit its parts together."""
    return (field_of(config, "hidden_size") or _WIDEST + 1) <= _WIDEST and config.vocab_size <= 2 * VOCAB_SIZE


def shrink(config: PreTrainedConfig, layout: Layout, *, layers: int = 0) -> PreTrainedConfig:
    """Return the config with small sizes that `layout` shards in the same way (heads stay grouped, or shared between ranks).

    layers: the depth, where not the layout's stages decide it.

    Context ranks that divide heads count like tensor ranks. What does not fit together stays so: key/value heads that do not
    divide the heads, an odd head width, a padding id beyond the vocabulary.
    """
    names = dict(getattr(type(config), "attribute_map", {}))
    fields = config.to_dict()
    layers = layers or min(config.num_hidden_layers, max(4, 2 * layout.pipeline, layout.chunks * layout.pipeline))

    def put(name: str, value: Any) -> None:
        own = names.get(name, name)
        if fields.get(own) is not None:
            fields[own] = value

    for name, cap in _CAPS.items():
        own = names.get(name, name)
        if isinstance(fields.get(own), int) and not isinstance(fields[own], bool):
            fields[own] = min(fields[own], cap)
        elif isinstance(fields.get(own), list) and all(isinstance(size, int) for size in fields[own]):
            fields[own] = [min(size, cap) for size in fields[own]]  # a width for each layer
    for inner in (block for value in fields.values() for block in _dicts(value)):  # an encoder of images or sound
        for depth in ("num_hidden_layers", "num_blocks"):
            if isinstance(inner.get(depth), int):
                inner[depth] = min(inner[depth], _DEPTH)
    _shrink_experts(fields, names, config, layout)
    heads, kv_heads = _heads(config, layout.tensor * head_ranks(config, layout))
    put("num_attention_heads", heads)
    put("num_key_value_heads", kv_heads)
    width = _HEAD_DIM - (field_of(config, "head_dim") or 0) % 2
    if rotated := fields.get("qk_rope_head_dim"):  # latent attention has its own widths; head_dim is the rotary one, or all of it
        own = field_of(config, "head_dim") == field_of(config, "qk_rope_head_dim")
        width = rotated if own else rotated + (fields.get("qk_nope_head_dim") or 0)
    put("head_dim", width)
    put("d_head", _HEAD_DIM)
    put("hidden_size", heads * _HEAD_DIM)
    # second names of the same numbers, which xlstm keeps beside transformers'
    put("embedding_dim", heads * _HEAD_DIM)
    put("num_blocks", layers)
    if "attention_hidden_size" in fields:  # attention over hidden states beside the embedded input
        put("attention_hidden_size", 2 * heads * _HEAD_DIM)
        put("attention_head_dim", 2 * _HEAD_DIM)
    # layers with a window may have heads of their own (Inkling's)
    put("swa_num_attention_heads", heads)
    put("swa_num_key_value_heads", kv_heads)
    put("swa_head_dim", _HEAD_DIM)
    put("lru_width", heads * _HEAD_DIM)
    _shrink_state_space(fields, put, heads * _HEAD_DIM)
    _shrink_rotations(fields, _rotary_width(config), width)
    return _rebuilt(config, fields, layers)


def _shrink_experts(fields: dict[str, Any], names: dict[str, str], config: PreTrainedConfig, layout: Layout) -> None:
    """Keep a whole number of experts on each rank that shares them, where there is one."""
    ranks = layout.expert * (layout.tensor if layout.experts == WHOLE else 1)
    for name in _EXPERT_COUNTS:
        own, count = names.get(name, name), field_of(config, name)
        if isinstance(count, int) and count and count % ranks == 0 and isinstance(fields.get(own), int):
            fields[own] = ranks * -(-fields[own] // ranks)


def _shrink_state_space(fields: dict[str, Any], put: Callable[[str, Any], None], hidden: int) -> None:
    """Shrink state-space layers: their heads x head width are the inner width, a multiple of the model's own."""
    if isinstance(fields.get("expand"), int | float):
        inner = int(fields["expand"] * hidden)
        put("intermediate_size", inner)
        put("num_heads", inner // _HEAD_DIM)
    inner = 2 * hidden
    for name, value in (("mamba_expand", 2), ("mamba_d_ssm", inner)):
        put(name, value)
    for name in ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"):
        put(name, inner // _HEAD_DIM)
    for name in ("mamba_d_head", "mamba_head_dim", "mamba_headdim"):
        put(name, _HEAD_DIM)


def shallow(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config with its own widths, and less of what only repeats: two layers, few experts and a small vocabulary."""
    names = dict(getattr(type(config), "attribute_map", {}))
    fields = config.to_dict()
    for name in (*_EXPERT_COUNTS, "num_experts_per_tok"):
        own = names.get(name, name)
        if isinstance(fields.get(own), int) and not isinstance(fields[own], bool):
            fields[own] = min(fields[own], _CAPS[name])
    return _rebuilt(config, fields, min(config.num_hidden_layers, _DEPTH))


def _rebuilt(config: PreTrainedConfig, fields: dict[str, Any], layers: int) -> PreTrainedConfig:
    """Return a config of `fields` with a small depth and vocabulary, in which special ids keep their relations."""
    names = dict(getattr(type(config), "attribute_map", {}))
    depth, vocab = config.num_hidden_layers, min(config.vocab_size, VOCAB_SIZE)
    fields[names.get("num_hidden_layers", "num_hidden_layers")] = layers
    fields[names.get("vocab_size", "vocab_size")] = vocab
    moved: dict[int, int] = {}
    for name, value in list(fields.items()):
        if name.endswith("_token_id") and isinstance(value, int) and value >= vocab:
            # ids beyond the vocabulary stay there; equal ones stay equal, and different ones different
            beyond = value >= config.vocab_size
            fields[name] = vocab + value - config.vocab_size if beyond else moved.setdefault(value, vocab - 1 - len(moved))
        elif isinstance(value, list) and len(value) == depth:
            fields[name] = _representative(value, layers)
        elif name == "per_layer_config" and isinstance(value, dict):
            fields[name] = _apart({int(i): own for i, own in value.items()}, field_of(config, "layer_types"), layers)
    for name in ("model_type", "transformers_version", "architectures", "_name_or_path", "dtype"):
        fields.pop(name, None)
    return type(config)(**fields)


def _rotary_width(config: PreTrainedConfig) -> int:
    width = field_of(config, "head_dim") or config.hidden_size // (field_of(config, "num_attention_heads") or 1)
    return width if isinstance(width, int) else 0


def _shrink_rotations(fields: dict[str, Any], old: int, new: int) -> None:
    """Cut lists that have a value for each rotated pair of a head (long-context factors of phi3) to the new width's."""
    for name in ("rope_parameters", "rope_scaling"):
        for block in _dicts(fields.get(name)):
            share = block.get("partial_rotary_factor") or fields.get("partial_rotary_factor") or 1.0
            for key, value in block.items():
                if isinstance(value, list) and len(value) == int(old * share) // 2:
                    block[key] = value[: int(new * share) // 2]


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    """Yield a dict and those in it: some families have one block for each type of layer."""
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _dicts(inner)


def _heads(config: PreTrainedConfig, ranks: int) -> tuple[int, int]:
    """Return few heads, in the real relation to the ranks that divide them: kv heads divided stay so, fewer stay fewer."""
    heads = field_of(config, "num_attention_heads") or 4  # a family without attention has none
    kv_heads = field_of(config, "num_key_value_heads") or heads
    if heads % kv_heads:  # stays impossible, where it is
        small = 2 * ranks if ranks > 1 else 4
        return small, small - 1
    if kv_heads == heads:
        small = ranks if ranks > 2 else 4
        return small, small
    small_kv = kv_heads if kv_heads < ranks else max(ranks, min(kv_heads, 2))
    unit = math.lcm(small_kv, ranks)
    return unit * -(-2 * small_kv // unit), small_kv


def _apart(values: dict[int, dict[str, Any]], kinds: list[str] | None, count: int) -> dict[int, dict[str, Any]]:
    """Return the fields of layers that differ from the others, by index: of a whole kind of layer, or else of the last one."""
    if not values:
        return values
    small = {
        i: {name: min(n, _CAPS.get(name, n)) if type(n) is int else n for name, n in own.items()} for i, own in values.items()
    }
    by_kind = {kind: small.get(kinds.index(kind)) for kind in kinds or ()}
    if all(small.get(i) == by_kind[kind] for i, kind in enumerate(kinds or ())):
        return {i: by_kind[kind] for i, kind in enumerate(_representative(kinds, count)) if by_kind[kind]} if kinds else small
    return {count - 1: next(iter(small.values()))}


def _representative(values: list[Any], count: int) -> list[Any]:
    """Return the first `count` values, the last of them replaced by kinds that would be missing."""
    kept = values[:count]
    missing = [value for i, value in enumerate(values) if value not in kept and value not in values[:i]]
    for index, value in zip(reversed(range(count)), missing[: count - 1], strict=False):
        kept[index] = value
    return kept
