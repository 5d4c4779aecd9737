"""Stands in for modules that a rank does not have, or whose chunk does not run (recipes.common.pipeline.stage draws it)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from recipes.common.model.decoder import Stack
from recipes.common.pipeline.places import Crossings


class Placeholder(nn.Module):
    """Returns its input in the place of a layer or norm.

    Plain attributes (layer_idx, attention_type) remain, its own and its class's, the names of parameters, whose types some
    families ask, and its submodules' buffers, which falcon_h1's model fills for its layers. outputs: of a tuple, whose others are
    None; 0 for no tuple.
    """

    def __init__(self, original: nn.Module, *, outputs: int = 0) -> None:
        super().__init__()
        self.outputs = outputs
        for holder in (original, *(kind for kind in type(original).__mro__ if not issubclass(nn.Module, kind))):
            for name, value in vars(holder).items():
                plain = not isinstance(value, nn.Module | torch.Tensor | property) and (holder is original or not callable(value))
                if plain and not name.startswith("_") and not hasattr(self, name):
                    setattr(self, name, value)
        for name, _ in original.named_parameters(recurse=False):
            setattr(self, name, torch.zeros(1))
        for name, child in original.named_children():
            if (buffers := dict(child.named_buffers(recurse=False))) and not hasattr(self, name):
                setattr(self, name, SimpleNamespace(**buffers))

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor | None, ...]:
        return (hidden_states, *[None] * (self.outputs - 1)) if self.outputs else hidden_states


class PlaceholderEmbedding(nn.Module):
    """Returns zeros in the place of an embedding of the first stage; the received activation replaces them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.dtype = width, torch.float32
        self.weight = torch.zeros(1, width)  # some families ask for its type

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        ids = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        return torch.zeros(*ids.shape, self.width, dtype=self.dtype, device=ids.device)


class PlaceholderLinear(nn.Module):
    """Returns zeros in the place of a linear outside the layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], self._width)


class PlaceholderBase(nn.Module):
    """Returns these hidden states in the place of the base model, while the head runs. Its numbers remain."""

    def __init__(self, original: nn.Module, hidden: torch.Tensor) -> None:
        super().__init__()
        self._hidden = hidden
        for name, value in vars(original).items():
            if isinstance(value, int | float) and not name.startswith("_") and not hasattr(self, name):
                setattr(self, name, value)  # falcon_h1 keeps the logits' scale there

    def forward(self, *args: Any, **kwargs: Any) -> _Hidden:
        return _Hidden(self._hidden)


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
    placeholder = PlaceholderBase(base, hidden)
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
    causal: PreTrainedModel, stack: Stack, crossings: Crossings, chunks: tuple[range, ...], *, first: bool, last: bool
) -> dict[str, nn.Module]:
    """Put placeholders where other ranks' layers and norms are. With several chunks, returns some for the rank's own, by name."""
    layers, own_placeholders = causal.get_submodule(stack.layers), {}
    names = [f"{stack.layers}.{index}" for index in range(len(layers))]
    own = {names[index] for chunk in chunks for index in chunk}
    own |= {*(stack.before if first else ()), *(stack.after if last else ())}
    for name in (*names, *stack.before, *stack.after):
        if name not in own:
            causal.set_submodule(name, _placeholder(causal, stack, name, crossings.outputs))
        elif len(chunks) > 1:
            own_placeholders[name] = _placeholder(causal, stack, name, crossings.outputs)
    for name in (*(() if first else crossings.before), *(() if last else crossings.after)):
        _take_out_parameter(causal, name)
    if not last:
        for name, _ in list(causal.named_children()):
            if name != stack.base:  # the head, and whatever a family keeps beside it
                causal._modules[name] = None
    return own_placeholders


def _take_out_parameter(causal: PreTrainedModel, name: str) -> None:
    """Leave zeros in the place of another stage's parameter outside the layers: its module runs, and nobody reads the result."""
    owner, _, leaf = name.rpartition(".")
    try:
        module = causal.get_submodule(owner)
    except AttributeError:  # it went with another parameter of its module
        return
    if isinstance(module, nn.Embedding):
        causal.set_submodule(owner, PlaceholderEmbedding(module.embedding_dim))
    elif type(module) is nn.Linear:
        causal.set_submodule(owner, PlaceholderLinear(module.out_features))
    elif leaf in module._parameters:
        shape = module._parameters.pop(leaf).shape
        module.register_buffer(leaf, torch.zeros(shape), persistent=False)


def _placeholder(causal: PreTrainedModel, stack: Stack, name: str, outputs: int) -> nn.Module:
    module = causal.get_submodule(name)
    if name in stack.before and any(isinstance(part, nn.Embedding) for part in module.modules()):  # or what holds one, and a norm
        return PlaceholderEmbedding(getattr(module, "embedding_dim", causal.config.get_text_config().hidden_size))
    return Placeholder(module, outputs=outputs if name.rpartition(".")[0] == stack.layers else 0)
