"""Says which fields of a model's config draw random zeros."""

from __future__ import annotations

from transformers import PreTrainedConfig

DROPOUTS = frozenset(
    {"attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "residual_dropout", "dropout",
     "activation_dropout", "embedding_dropout", "resid_dropout", "embd_dropout", "ffn_dropout", "summary_first_dropout"}
)  # fmt: skip


def dropout_fields(config: PreTrainedConfig) -> list[str]:
    """Return the fields of dropout that are on, with their values."""
    fields = config.to_dict()
    return [f"{name}={value}" for name, value in fields.items() if name in DROPOUTS and isinstance(value, float) and value]
