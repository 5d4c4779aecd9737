"""Says which kernel computes attention on a GPU, and why not a faster one: asked of torch where there is a GPU, else by rule.

The rule is of torch 2.13 on CUDA (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp) and of transformers' "sdpa" function,
which lets the kernel group queries by key/value heads where there is no mask, and repeats keys and values where there is one.
attention="varlen" never makes one: where "sdpa" would, it has a kernel of its own (recipes.common.model.varlen_attention).
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch.backends import cuda
from torch.nn.attention import SDPBackend

from recipes.common.config.ds_config import load_ds_config, precision
from recipes.common.model.varlen_attention import VARLEN, kernel_refusal
from recipes.common.model.varlen_attention import WIDEST_HEAD as FLASH_HEAD
from recipes.common.parallel.context_parallel import head_ranks
from recipes.common.recipe import Layout, Recipe

FLASH, EFFICIENT, MATH, CUDNN = "flash", "memory-efficient", "math", "cuDNN"
_KERNELS = {
    SDPBackend.FLASH_ATTENTION: FLASH,
    SDPBackend.EFFICIENT_ATTENTION: EFFICIENT,
    SDPBackend.MATH: MATH,
    SDPBackend.CUDNN_ATTENTION: CUDNN,
}
_ASK = {
    CUDNN: cuda.can_use_cudnn_attention,
    FLASH: cuda.can_use_flash_attention,
    EFFICIENT: cuda.can_use_efficient_attention,
}
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_HALVES = ("bfloat16", "float16")
CUDNN_HEAD = 128  # of cuDNN's backward pass on Hopper


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """The arguments of one scaled_dot_product_attention on one rank. All fields are JSON types."""

    layers: str  # of which the call is
    micro_seqs: int
    seq_len: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: str  # torch's name
    masked: bool  # a mask is given: the kernel does not know that attention is causal
    segmented: bool = False  # attention="varlen" takes segments of the sequences in place of a mask

    @property
    def grouped(self) -> bool:
        """Return whether the kernel is asked to group queries, rather than given repeated keys and values."""
        return self.heads > self.kv_heads and not self.masked and self.head_dim == self.value_dim <= FLASH_HEAD


def attention_calls(recipe: Recipe, layout: Layout) -> list[AttentionCall]:
    """Return the calls of a rank's softmax attention, one for each kind of layer; none for another than "sdpa" or "varlen"."""
    config = recipe.model.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if recipe.attention not in ("sdpa", VARLEN) or not isinstance(heads, int):
        return []
    divided = layout.tensor * head_ranks(recipe.model, layout)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    latent = getattr(config, "qk_nope_head_dim", None)
    head_dim, value_dim = (latent + config.qk_rope_head_dim, config.v_head_dim) if latent else (width, width)
    kinds = dict.fromkeys(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    always = recipe.mask_documents or layout.context > head_ranks(recipe.model, layout)
    calls = []
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            continue
        slides = bool(window) and window < recipe.batch.seq_len and (kind == "sliding_attention" or len(kinds) == 1)
        calls.append(
            AttentionCall(
                layers=kind.split("_")[0],
                micro_seqs=recipe.batch.micro_seqs,
                seq_len=recipe.batch.seq_len,
                heads=max(heads // divided, 1),
                kv_heads=max(kv_heads // divided, 1),
                head_dim=head_dim,
                value_dim=value_dim,
                dtype=_DTYPES[precision(load_ds_config(recipe.deepspeed))],
                masked=(always or slides) and recipe.attention == "sdpa",
                segmented=(always or slides) and recipe.attention == VARLEN,
            )
        )
    return calls


def expected_kernel(call: AttentionCall) -> tuple[str, str]:
    """Return (the kernel, why) on an NVIDIA GPU of Ampere or newer, by rule."""
    if call.dtype not in _HALVES:
        if call.grouped:
            return MATH, f"{call.dtype} has no fused kernel for grouped key/value heads: whole S x S matrices in memory"
        return EFFICIENT, f"flash and cuDNN compute in 16 bits, not in {call.dtype}"
    if call.masked:
        return EFFICIENT, "flash takes no mask"
    if call.head_dim != call.value_dim:
        return EFFICIENT, f"flash needs equal widths of keys and values, not {call.head_dim} and {call.value_dim}"
    if call.head_dim > FLASH_HEAD:
        return EFFICIENT, f"heads of {call.head_dim} are wider than flash's {FLASH_HEAD}"
    if call.head_dim <= CUDNN_HEAD and call.head_dim % 8 == 0:
        return f"{FLASH}, on Hopper and newer {CUDNN}", "16 bits, causal without a mask"
    return FLASH, f"heads of {call.head_dim} are not cuDNN's"


def chosen_kernel(call: AttentionCall, device: torch.device) -> tuple[str, str]:
    """Return (the kernel, why no faster one) that torch chooses on this GPU."""
    dtype = getattr(torch, call.dtype)
    keys = call.kv_heads if call.grouped else call.heads
    shape = call.micro_seqs, call.seq_len
    query, key, value = (
        torch.empty(shape[0], heads, shape[1], width, dtype=dtype, device=device, requires_grad=True)
        for heads, width in ((call.heads, call.head_dim), (keys, call.head_dim), (keys, call.value_dim))
    )
    # as many rows as sequences may be expanded: choosing reads shapes and strides, not values
    mask = (
        torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device).expand(shape[0], 1, shape[1], shape[1]) if call.masked else None
    )
    options = {"scale": None, "enable_gqa": call.grouped}
    chosen = _KERNELS[SDPBackend(torch._fused_sdp_choice(query, key, value, mask, 0.0, not call.masked, **options))]
    params = cuda.SDPAParams(query, key, value, mask, 0.0, not call.masked, call.grouped)
    why = []
    for name in (CUDNN, FLASH):
        if name != chosen and (reason := _refusal(name, params)):
            why.append(f"not {name}: {reason}")
    return chosen, "; ".join(why) or "torch's first choice here"


def _refusal(kernel: str, params: Any) -> str | None:
    """Return torch's reason against a kernel, which it gives as a warning."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        usable = _ASK[kernel](params, debug=True)
    lines = [re.sub(r"\s*\(Triggered internally at.*", "", str(each.message)).strip() for each in said]
    return None if usable else (lines[-1] if lines else "torch does not say why")


def _dropout(recipe: Recipe) -> float:
    """Return the part of attention that training drops, by transformers' common name or GPT-2's."""
    config = recipe.model.get_text_config()
    return getattr(config, "attention_dropout", None) or getattr(config, "attn_pdrop", None) or 0.0


def attention_lines(recipe: Recipe, layout: Layout) -> list[str]:
    """Return a line for each kind of attention layer: its kernel on this machine's GPU, or by rule, and why."""
    if recipe.attention not in ("sdpa", VARLEN):
        return [f"attention={recipe.attention!r}: its own kernel"]
    lines = []
    for call in attention_calls(recipe, layout):
        widths = call.head_dim, call.value_dim
        refusal = kernel_refusal(getattr(torch, call.dtype), *widths, _dropout(recipe)) if call.segmented else None
        if call.segmented and refusal is None:
            lines.append(f"{call.layers} layers: {FLASH} kernel for variable lengths (torch's varlen_attn; no mask)")
            continue
        on_gpu = torch.cuda.is_available()
        kernel, why = chosen_kernel(call, torch.device("cuda")) if on_gpu else expected_kernel(call)
        source = torch.cuda.get_device_name() if on_gpu else "by rule: there is no GPU here"
        how = f"one document after another, not all at once: {refusal}; " if refusal else ""
        lines.append(f"{call.layers} layers: {how}{kernel} kernel ({why}; {source})")
    return lines
