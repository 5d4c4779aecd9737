"""Stands in for modules that a rank does not have, or whose chunk does not run (recipes.common.pipeline.stage draws it)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from recipes.common.model.decoder import TUPLE_LAYERS, Stack


class Placeholder(nn.Module):
    """Returns its input in the place of a layer or norm. Plain attributes (layer_idx, attention_type) remain."""

    def __init__(self, original: nn.Module, *, as_tuple: bool = False) -> None:
        super().__init__()
        self.as_tuple = as_tuple
        for name, value in vars(original).items():
            if not name.startswith("_") and not isinstance(value, nn.Module | torch.Tensor) and not hasattr(self, name):
                setattr(self, name, value)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor, None]:
        return (hidden_states, None) if self.as_tuple else hidden_states


class PlaceholderEmbedding(nn.Module):
    """Returns zeros in the place of an embedding of the first stage; the received activation replaces them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.dtype = width, torch.float32

    def forward(self, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*ids.shape, self.width, dtype=self.dtype, device=ids.device)


class PlaceholderBase(nn.Module):
    """Returns the hidden states it is given in the place of the base model, while the head runs. Its numbers remain."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        for name, value in vars(original).items():
            if isinstance(value, int | float) and not name.startswith("_") and not hasattr(self, name):
                setattr(self, name, value)  # falcon_h1 keeps the logits' scale there

    def forward(self, input_ids: None = None, inputs_embeds: torch.Tensor | None = None, **kwargs: Any) -> _Hidden:
        return _Hidden(inputs_embeds)


class _Hidden:
    """A base model's output that holds nothing but the hidden states."""

    def __init__(self, last_hidden_state: torch.Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, index: int) -> torch.Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


def run_head(causal: PreTrainedModel, stack: Stack, hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits that the ForCausalLM's own forward makes of final hidden states."""
    modules, name = causal._modules, stack.base
    base = modules[name]
    placeholder = PlaceholderBase(base)
    for part in stack.layers.split(".")[1:-1]:  # some families call `self.model.decoder` rather than `self.model`
        object.__setattr__(placeholder, part, placeholder)
    modules[name] = placeholder
    try:
        return causal(inputs_embeds=hidden, use_cache=False).logits
    finally:
        modules[name] = base


class Slot:
    """Exchanges a module of one chunk for its placeholder while another chunk runs."""

    def __init__(self, causal: PreTrainedModel, name: str, placeholder: nn.Module, chunk: int) -> None:
        parent, _, self._child = name.rpartition(".")
        self._modules = causal.get_submodule(parent)._modules
        self._own, self._placeholder, self._chunk = self._modules[self._child], placeholder, chunk

    def fill(self, chunk: int) -> None:
        self._modules[self._child] = self._own if chunk == self._chunk else self._placeholder

    def restore(self) -> None:
        self._modules[self._child] = self._own


def chunk_of(name: str, stack: Stack, chunks: tuple[range, ...]) -> int:
    """Return which of a rank's chunks runs its module `name`: a layer, or one before or after the layers."""
    parent, _, child = name.rpartition(".")
    if parent == stack.layers:
        return next(i for i, chunk in enumerate(chunks) if int(child) in chunk)
    return 0 if name in stack.before else len(chunks) - 1


def take_out(
    causal: PreTrainedModel, stack: Stack, chunks: tuple[range, ...], *, first: bool, last: bool
) -> dict[str, nn.Module]:
    """Put placeholders where other ranks' layers and norms are. With several chunks, returns some for the rank's own, by name."""
    layers, own_placeholders = causal.get_submodule(stack.layers), {}
    names = [f"{stack.layers}.{index}" for index in range(len(layers))]
    own = {names[index] for chunk in chunks for index in chunk}
    own |= {*(stack.before if first else ()), *(stack.after if last else ())}
    for name in (*names, *stack.before, *stack.after):
        if name not in own:
            causal.set_submodule(name, _placeholder(causal, stack, name))
        elif len(chunks) > 1:
            own_placeholders[name] = _placeholder(causal, stack, name)
    if not last:
        for name, _ in list(causal.named_children()):
            if name != stack.base:  # the head, and whatever a family keeps beside it
                causal._modules[name] = None
    return own_placeholders


def _placeholder(causal: PreTrainedModel, stack: Stack, name: str) -> nn.Module:
    module = causal.get_submodule(name)
    if name in stack.before and isinstance(module, nn.Embedding):
        return PlaceholderEmbedding(getattr(module, "embedding_dim", causal.config.get_text_config().hidden_size))
    is_layer = name.rpartition(".")[0] == stack.layers
    return Placeholder(module, as_tuple=is_layer and causal.config.model_type in TUPLE_LAYERS)
