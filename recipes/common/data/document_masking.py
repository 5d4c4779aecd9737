"""Keeps the documents of a packed sequence apart: positions that restart at each document, which attention follows."""

from __future__ import annotations

import torch

# attentions that read document bounds off restarting positions, "varlen" by our code, the others by that of transformers 5.23:
# from any batch, or from a batch of one sequence only (modeling_flash_attention_utils._is_packed_sequence)
MASKS = ("sdpa", "varlen", "eager", "flex_attention")
MASKS_ONE_SEQUENCE = ("flash_attention_2", "flash_attention_3")


def document_positions(tokens: torch.Tensor, eos_id: int) -> torch.Tensor:
    """Return positions that restart after each end token: int64 [B, S] -> int64 [B, S].

    Given to a transformers model as `position_ids`, without an attention mask and with use_cache=False, they also keep
    attention inside each document (transformers.masking_utils), unless `masking_problem` says otherwise.
    """
    starts = torch.zeros_like(tokens)
    starts[:, 1:] = tokens[:, :-1] == eos_id
    index = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return index - torch.where(starts.bool(), index, 0).cummax(dim=1).values


def masking_problem(attention: str, micro_seqs: int) -> str | None:
    """Say why this `attn_implementation` cannot mask documents from each other; None if it can."""
    if attention in MASKS_ONE_SEQUENCE:
        if micro_seqs == 1:
            return None
        return (
            f"batch.micro_seqs={micro_seqs}: attention={attention} keeps documents apart only with one sequence in a "
            "micro batch (with more, transformers ignores the restarts without a word); set batch.micro_seqs=1"
        )
    if attention in MASKS:
        return None
    names = ", ".join(MASKS + MASKS_ONE_SEQUENCE)
    return f"attention={attention} cannot keep documents apart; choose one of {names}, or turn document masking off"
