"""Counts the multiply-adds of a decoder's layers, and from them its training FLOPs, by every convention in use.

A matrix multiplication of [tokens, in] by [in, out] is 2 in out FLOPs a token; its backward pass is twice its forward pass. The
head counts, looking up an embedding does not; norms, activations and softmax are left out, as everywhere. Tools differ in
attention (the whole square of scores, or the causal half that is computed), in recomputation, and in whether the head and the
embedding count: `conventions` gives them side by side. The same count decides where a model is partitioned into stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from recipes.common.model.decoder import Stack

OURS = "ours"  # the convention behind every MFU that Trifold prints
_QUERIES = frozenset({"q_proj", "qkv_proj", "query_key_value", "c_attn", "q_b_proj", "query", "q", "Wqkv", "qkv", "attn"})
_UNCOUNTED = frozenset({"linear_attention", "mamba", "mamba2", "recurrent", "conv", "hybrid"})  # layer types with a recurrence


@dataclass(frozen=True, kw_only=True)
class LayerWork:
    """One decoder layer's forward pass, in multiply-adds a token."""

    matrices: float  # elements of its matrices; of experts, those that a token visits
    scores: float  # heads x (query width + value width): multiply-adds for each key a token attends to; 0 without attention
    window: int | None = None  # a token attends to so many keys at most (sliding window)
    chunk: int | None = None  # attention stays inside chunks of this length

    def keys(self, seq_len: int, *, causal: bool) -> float:
        """Return the mean keys a token attends to: in the whole square, or under the diagonal (s / 2, as Megatron-LM)."""
        if self.chunk is not None:
            seq_len = min(seq_len, self.chunk)
        window = min(self.window or seq_len, seq_len)
        return window - window**2 / (2 * seq_len) if causal else window

    def attention(self, seq_len: int) -> float:
        """Return the multiply-adds a token of attention's scores and their use, of the causal half."""
        return self.scores * self.keys(seq_len, causal=True)


@dataclass(frozen=True, kw_only=True)
class ModelWork:
    """A decoder's forward pass, in multiply-adds a token."""

    layers: tuple[LayerWork, ...]
    outside: float  # matrices outside the layers (projections of embeddings), without the head
    head: float  # hidden size x vocabulary
    hidden: int
    vocab: int
    params: int  # all of them; tied weights once
    visited: float  # `params`, counting only the experts that a token visits
    embedding: int  # parameters that are only looked up: 0 when the head is tied to the embedding
    uncounted: tuple[str, ...] = ()  # layer types whose recurrence is not a matrix multiplication and is left out


def layer_work(causal: PreTrainedModel, stack: Stack) -> tuple[LayerWork, ...]:
    """Count every decoder layer of a ForCausalLM (on any device; `build_empty` takes no memory)."""
    config, layers = causal.config.get_text_config(), causal.get_submodule(stack.layers)
    chosen = getattr(config, "num_experts_per_tok", None)
    return tuple(
        _layer_work(layer, config, kind, sum(size for _, size in matrices_of(layer, chosen)))
        for layer, kind in zip(layers, _layer_types(config, len(layers)), strict=True)
    )


def model_work(causal: PreTrainedModel, stack: Stack) -> ModelWork:
    """Count a whole ForCausalLM (on any device)."""
    config = causal.config.get_text_config()
    chosen = getattr(config, "num_experts_per_tok", None)
    layers = causal.get_submodule(stack.layers)
    inside = {id(p) for p in layers.parameters()}
    head = causal.get_output_embeddings()
    outside = sum(size for p, size in matrices_of(causal, chosen) if id(p) not in inside and p is not head.weight)
    idle = sum(p.numel() - size for p, size in matrices_of(causal, chosen) if p.ndim == 3)
    embedding = causal.get_submodule(stack.embedding)
    params = sum(p.numel() for p in causal.parameters())
    return ModelWork(
        layers=layer_work(causal, stack),
        outside=outside,
        head=float(head.weight.numel()),
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        params=params,
        visited=params - idle,
        embedding=0 if stack.tied else sum(p.numel() for p in embedding.parameters()),
        uncounted=tuple(sorted(_UNCOUNTED & set(_layer_types(config, len(layers))))),
    )


def layer_costs(causal: PreTrainedModel, stack: Stack, seq_len: int) -> tuple[list[float], float]:
    """Return (cost of each layer, cost of head and loss) in multiply-adds a token, forward: what the stages are balanced by."""
    layers = [layer.matrices + layer.attention(seq_len) for layer in layer_work(causal, stack)]
    return layers, float(causal.get_output_embeddings().weight.numel())


def attention_costs(causal: PreTrainedModel, stack: Stack, seq_len: int) -> list[float]:
    """Return the part of each layer's cost that attention's scores and their use have: work without weights."""
    return [layer.attention(seq_len) for layer in layer_work(causal, stack)]


def matrices_of(root: nn.Module, chosen: int | None) -> Iterator[tuple[nn.Parameter, float]]:
    """Yield (parameter, elements that a token is multiplied by) for every matrix under `root`."""
    for module in root.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.Embedding) or parameter.ndim < 2:
                continue
            if isinstance(module, nn.Linear | Conv1D | nn.Conv1d):
                yield parameter, float(parameter.numel())
            elif parameter.ndim == 3:  # a bank of experts
                yield parameter, parameter.numel() * (chosen or parameter.shape[0]) / parameter.shape[0]
            elif name == "weight":  # a router
                yield parameter, float(parameter.numel())


def _layer_types(config: Any, count: int) -> list[str]:
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if kinds:
        return list(kinds)
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return ["sliding_attention" if windowed else "full_attention"] * count


def _head_dim(layer: nn.Module, config: Any) -> int:
    """Return the width of this layer's heads, which may differ between layers; 0 where nothing says it."""
    found = next((width for module in layer.modules() if isinstance(width := getattr(module, "head_dim", None), int)), 0)
    return found or getattr(config, "head_dim", None) or 0


def _layer_work(layer: nn.Module, config: Any, kind: str, matrices: float) -> LayerWork:
    attends = kind not in _UNCOUNTED and any(name.rpartition(".")[2] in _QUERIES for name, _ in layer.named_modules())
    heads = (getattr(config, "num_attention_heads", None) or 0) if attends else 0
    width = _head_dim(layer, config) or (config.hidden_size // heads if heads else 0)
    latent = getattr(config, "qk_nope_head_dim", None)  # multi-head latent attention: queries and values differ in width
    query, value = (latent + config.qk_rope_head_dim, config.v_head_dim) if latent else (width, width)
    return LayerWork(
        matrices=matrices,
        scores=float(heads * (query + value)),
        window=config.sliding_window if kind == "sliding_attention" else None,
        chunk=getattr(config, "attention_chunk_size", None) if kind == "chunked_attention" else None,
    )


def forward_flops(work: ModelWork, seq_len: int, *, causal: bool) -> tuple[float, float, float]:
    """Return the FLOPs a token of the forward pass: (matrices without the head, attention's scores and their use, head)."""
    attention = 2.0 * sum(layer.scores * layer.keys(seq_len, causal=causal) for layer in work.layers)
    return 2.0 * (sum(layer.matrices for layer in work.layers) + work.outside), attention, 2.0 * work.head


def training_flops(work: ModelWork, seq_len: int) -> float:
    """Return the FLOPs a token, forward and backward, without recomputation: the count behind Trifold's MFU."""
    return 3.0 * sum(forward_flops(work, seq_len, causal=True))


def conventions(work: ModelWork, seq_len: int) -> dict[str, tuple[float, str]]:
    """Return name -> (FLOPs a token, what it counts and who uses it). OURS is the first."""
    matrices, half, head = forward_flops(work, seq_len, causal=True)
    full = forward_flops(work, seq_len, causal=False)[1]
    table = {
        OURS: (3 * (matrices + half + head), "3 x forward, causal half of attention, head; no recomputation. As Megatron-LM"),
        "full_attention": (3 * (matrices + full + head), "the same with the whole square of scores (nanotron, flop counters)"),
        "6n": (6.0 * work.visited, "6 x parameters a token visits, embeddings too; no attention (arXiv 2001.08361)"),
        "palm_mfu": (6.0 * work.visited + 3 * full, "6n + whole attention (arXiv 2204.02311, appendix B; llm-foundry, picotron)"),
        "no_embedding": (
            6.0 * (work.visited - work.embedding) + 3 * full,
            "palm_mfu without the input embedding (OLMo-core, torchtitan)",
        ),
        "hfu_full": (4 * (matrices + half) + 3 * head, "ours + the layers' forward pass again (full recomputation)"),
        "hfu_selective": (3 * (matrices + head) + 4 * half, "ours + attention's scores again (selective recomputation)"),
    }
    if len(set(work.layers)) == 1:  # these two know one kind of layer, of GPT-3's shape
        shape = (len(work.layers), work.hidden, work.vocab, seq_len)
        table["sc21_eq3"] = (sc21_eq3(*shape), "arXiv 2104.04473: GPT-3's shape with full recomputation (GPT-NeoX, BLOOM's logs)")
        table["korthikanti"] = (korthikanti(*shape), "arXiv 2205.05198: GPT-3's shape, whole attention")
        table["korthikanti_hfu"] = (korthikanti(*shape, selective=True), "korthikanti + selective recomputation")
    return table


def sc21_eq3(layers: int, hidden: int, vocab: int, seq_len: int) -> float:
    """Return FLOPs a token by equation 3 of arXiv 2104.04473: 4h MLP, full attention, every layer's forward pass twice."""
    return 96.0 * layers * hidden**2 * (1 + seq_len / (6 * hidden) + vocab / (16 * layers * hidden))


def korthikanti(layers: int, hidden: int, vocab: int, seq_len: int, *, selective: bool = False) -> float:
    """Return FLOPs a token by arXiv 2205.05198, appendix A; `selective` adds attention's recomputation (hardware FLOPs)."""
    return 72.0 * layers * hidden**2 * (1 + seq_len / ((3 if selective else 6) * hidden) + vocab / (12 * layers * hidden))
