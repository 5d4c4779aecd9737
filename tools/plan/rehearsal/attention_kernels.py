"""Takes the attention kernel that a GPU would: a build without CUDA would compute the whole score matrix instead."""

from __future__ import annotations

import torch

_FUSED_DTYPES = (torch.float16, torch.bfloat16)
_WIDEST_HEAD = 256  # of the flash kernel
_ALIGNED = 16  # elements: the efficient kernel's rows of a mask


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Compute scaled_dot_product_attention [seqs, heads, length, width] by the kernel that CUDA prefers for these tensors.

    Without a mask, in 16 bits: flash (cuDNN's keeps the same tensors). With one, in fp32, or where values are narrower than keys
    (latent attention): the memory-efficient one, which wants a mask of the scores' dtype. fp32 with fewer key heads than query
    heads has neither: products and a softmax.
    """
    aten = torch.ops.aten
    flash = attn_mask is None and query.dtype in _FUSED_DTYPES and query.shape[-1] <= _WIDEST_HEAD
    if flash and value.shape[-1] == query.shape[-1]:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if enable_gqa and key.shape[1] != query.shape[1]:
        if query.dtype not in _FUSED_DTYPES:
            return _by_products(query, key, value, attn_mask, dropout_p, is_causal, scale)
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    bias = None if attn_mask is None else _bias(attn_mask, query, key)
    learn = torch.is_grad_enabled() and query.requires_grad
    return aten._scaled_dot_product_efficient_attention(query, key, value, bias, learn, dropout_p, is_causal, scale=scale)[0]


def _bias(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return what the kernel adds to the scores, as scaled_dot_product_attention makes it of any mask."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    if mask.shape[-1] % _ALIGNED:
        wanted = mask.shape[-1]
        mask = torch.nn.functional.pad(mask, (0, _ALIGNED - wanted % _ALIGNED))[..., :wanted]
    return mask.expand(*query.shape[:3], key.shape[2])


def _by_products(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    return torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, mask, dropout, is_causal, scale=scale, enable_gqa=True
    )[0]
