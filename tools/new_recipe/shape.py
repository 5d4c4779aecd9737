"""Chooses a width and a depth for a number of parameters, in the proportions of a model that is known to train."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from recipes.common.model.decoder import find_stack
from recipes.common.model.flops import layer_costs
from recipes.common.model.initial_weights import build_empty
from tools.common.console import UsageError

ASPECT = 115.0  # width / depth, the middle of Llama 3's: 8B has 128, 70B has 102, 405B has 130 (arXiv 2407.21783, table 3)
ASPECTS = (64.0, 192.0)  # tried; the loss is flat over this range (arXiv 2001.08361, figure 5)
ASPECT_WEIGHT = 0.1  # of a factor of two in the aspect, against the relative error in the number of parameters
FEED_FORWARD_MULTIPLE = 64  # keeps matrix products on tile boundaries, at tensor=8 too
LARGE = 1e10  # parameters from which heads come in eights, for the 8 GPUs of a machine
CLOSE = 0.1  # a shape further than this from the wanted number is rejected


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The fields of a config that make its size, by the config's own names."""

    fields: dict[str, int]
    num_params: int
    layer_params: float  # multiply-adds a token in the layers, forward: what works on a token, attention's scores included
    aspect: float


def choose_shape(config: PreTrainedConfig, stated: dict[str, Any], num_params: float, seq_len: int) -> ModelShape:
    """Return the shape nearest to `num_params` with the head size, grouping and feed-forward ratio of `config`.

    stated: the fields that its recipe states; all but the shape's are kept. Raises UsageError when none comes within 10 %.
    """
    best: tuple[float, dict[str, int]] | None = None
    heads_unit = math.gcd(config.num_attention_heads, 4 if num_params < LARGE else 8)  # a tensor size that divides them
    per_head = config.hidden_size / config.num_attention_heads  # of the width; the head itself may be wider
    most = (ASPECTS[1] * num_params) ** (1 / 3)  # wider, the fewest layers that ASPECTS allows have more than width^2 each
    for heads in range(heads_unit, int(most / per_head) + heads_unit + 1, heads_unit):
        width = heads * per_head
        if width % 1 or width < ASPECTS[0]:
            continue
        fields = _fields(config, int(width), heads)
        one, two = (_count(type(config), stated | fields | _depth(config, depth)) for depth in (1, 2))
        depth = round((num_params - one) / (two - one)) + 1
        aspect = width / max(depth, 1)
        if depth < 2 or not ASPECTS[0] <= aspect <= ASPECTS[1]:
            continue
        error = abs(one + (depth - 1) * (two - one) - num_params) / num_params
        badness = error + ASPECT_WEIGHT * abs(math.log2(aspect / ASPECT))
        if error <= CLOSE and (best is None or badness < best[0]):
            best = badness, fields | _depth(config, depth)
    if best is None:
        raise UsageError(
            f"--params={num_params:.3g}: no shape in the proportions of this model comes within {CLOSE:.0%} of it with "
            f"width / depth between {ASPECTS[0]:.0f} and {ASPECTS[1]:.0f}; give another --like or another size"
        )
    whole = type(config)(**(stated | best[1]))
    causal = build_empty(whole, "sdpa")
    layers, _ = layer_costs(causal, find_stack(causal), seq_len)
    count = sum(p.numel() for p in causal.parameters())
    return ModelShape(
        fields=best[1], num_params=count, layer_params=sum(layers), aspect=whole.hidden_size / whole.num_hidden_layers
    )


def _fields(config: PreTrainedConfig, width: int, heads: int) -> dict[str, int]:
    own = dict(getattr(type(config), "attribute_map", {}))
    fields = {own.get("hidden_size", "hidden_size"): width, own.get("num_attention_heads", "num_attention_heads"): heads}
    kv_heads = getattr(config, "num_key_value_heads", None)
    if kv_heads:
        fields["num_key_value_heads"] = heads if kv_heads == config.num_attention_heads else math.gcd(kv_heads, heads)
    for name in ("intermediate_size", "moe_intermediate_size"):
        value = getattr(config, name, None)
        if value:
            ratio = value / config.hidden_size
            fields[name] = max(round(ratio * width / FEED_FORWARD_MULTIPLE), 1) * FEED_FORWARD_MULTIPLE
    return fields


def _depth(config: PreTrainedConfig, depth: int) -> dict[str, int]:
    return {dict(getattr(type(config), "attribute_map", {})).get("num_hidden_layers", "num_hidden_layers"): depth}


def _count(config_class: type[PreTrainedConfig], fields: dict[str, Any]) -> int:
    return sum(p.numel() for p in build_empty(config_class(**fields), "sdpa").parameters())
