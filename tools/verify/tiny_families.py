"""Makes a tiny random configuration of each causal model type that the installed transformers knows, or says why it does not.

No list of families: a type's own default configuration is shrunk as a recipe's would be. Fields that it leaves open (None) get
what the family computes from the others; what cannot be a decoder of text alone is left out by what its configuration says.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from recipes.common.model.initial_weights import build_empty
from recipes.common.parallel.tiny_model import field_of, shrink
from recipes.common.recipe import Layout

# Fields that a family's default leaves unset or sets for a larger model, where no rule finds them
_FIELDS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 96}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_LENGTH = 8  # tokens by which an encoder is told
_ONE_SIZE = ("num_attention_heads", "num_key_value_heads", "head_dim")


class LeftOutError(ValueError):
    """Raised for a type that is no decoder of text alone, or whose configuration cannot be made tiny; the message says why."""


@dataclass(frozen=True)
class TinyFamily:
    """A tiny model of a type that both sides of the gate train."""

    name: str
    config: PreTrainedConfig


def family_names() -> list[str]:
    """Return every causal model type of the installed transformers."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def load_family(name: str) -> None:
    """Import the code of a type's model, so that ranks that are forked from here have it."""
    with contextlib.suppress(Exception):  # what it raises it raises again where the type is judged
        module = model_type_to_module_name(name)
        importlib.import_module(f"transformers.models.{module}.modeling_{module}")


def tiny_family(name: str, layout: Layout) -> TinyFamily:
    """Return a tiny model of a type that `layout` divides. Builds on the meta device: call it in a rank of its own."""
    try:
        config = _routed(AutoConfig.for_model(name, **_FIELDS.get(name, {})))
    except Exception as error:  # a family's own validation may raise anything
        raise LeftOutError(f"its default configuration is refused: {_line(error)}") from error
    if reason := _no_decoder(config):
        raise LeftOutError(reason)
    failed: Exception | None = None
    for prepare in (copy.deepcopy, _completed):
        try:
            tiny = _without_dropout(shrink(prepare(config), layout))
            if getattr(tiny, "is_decoder", None) is False and _sees_ahead(tiny):
                raise LeftOutError("an encoder: its default configuration says is_decoder=False, and it sees the future")
            build_empty(tiny, "eager")
            return TinyFamily(name, tiny)
        except LeftOutError:
            raise
        except Exception as error:  # shrunk so, the family's parts do not fit together
            failed = failed or error
    raise LeftOutError(f"its default configuration cannot be made tiny: {_line(failed)}") from failed


# types that no two layouts can train alike
_AT_RANDOM = {"phimoe": "it draws its experts at random in training, so that no two layouts train the same"}


def _no_decoder(config: PreTrainedConfig) -> str:
    """Say why a type is no decoder of text alone, or cannot be compared; empty if it can."""
    if config.model_type in _AT_RANDOM:
        return _AT_RANDOM[config.model_type]
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder with a decoder"
    try:
        text = config.get_text_config()
    except ValueError:  # it has several
        return "a multimodal type: its text model is inside it"
    if text is not config:
        return f"a multimodal type: its text model is of type {text.model_type}"
    if not isinstance(field_of(config, "num_hidden_layers"), int):
        return "its configuration has no num_hidden_layers: it is no single stack of layers"
    return ""


def _sees_ahead(tiny: PreTrainedConfig) -> bool:
    """Return whether a later token changes an earlier one's logits in plain transformers."""
    ids = torch.arange(_LENGTH).unsqueeze(0) + tiny.vocab_size // 2
    changed = torch.cat([ids[:, :-1], ids[:, -1:] + 1], dim=1)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_config(tiny, attn_implementation="eager", trust_remote_code=False).eval()
        before, after = (model(input_ids=each).logits[:, :-1] for each in (ids, changed))
    return not torch.allclose(before, after, atol=1e-6)


def _routed(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config with experts for each token, where it has experts and leaves that open."""
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk")
    open_ = [name for name in names if hasattr(config, name) and field_of(config, name) is None]
    if open_ and any(field_of(config, name) for name in EXPERTS):
        setattr(config, open_[0], 2)
    return config


def _completed(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config with what it leaves open: heads of key/value, one for each of query, equal widths, plain rotations."""
    completed = copy.deepcopy(config)
    heads = field_of(config, "num_attention_heads")
    sizes = dict(zip(_ONE_SIZE, (heads, heads, config.hidden_size // heads if heads else None), strict=True))
    for name, size in sizes.items():
        if hasattr(config, name) and field_of(config, name) is None:
            setattr(completed, name, size)
    kinds = field_of(config, "layer_types")
    if kinds and field_of(config, "rope_parameters") == {}:
        completed.rope_parameters = {kind: {"rope_type": "default", "rope_theta": 10_000.0} for kind in kinds}
    return completed


def _without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """Turn dropout off, in the blocks inside a config too: its random zeros differ between layouts by design."""
    _zero_dropout(vars(config))
    return config


def _zero_dropout(fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if isinstance(value, float) and any(word in ("pdrop", "dropout") for word in name.split("_")):
            fields[name] = 0.0
        elif isinstance(value, PreTrainedConfig):
            _zero_dropout(vars(value))


def _line(error: Exception | None) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
