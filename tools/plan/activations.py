"""What a layer keeps for its backward pass, measured: the model runs forward on tensors that have shapes but no memory.

Every tensor that autograd saves is counted once, by its storage, so any family, attention and precision is right without a
formula. A 70B model takes about a second on one core.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig, masking_utils

from recipes.common.model.decoder import TUPLE_LAYERS, find_stack
from recipes.common.model.recompute import product_ops
from recipes.common.pipeline.stage import Placeholder

TRAFFIC_PER_SAVED = 6.0  # a saved byte is written and read about three times, forward and backward


@dataclass(frozen=True, kw_only=True)
class LayerBytes:
    """Of one sequence in one layer. `whole` is held by every tensor rank, `cut` is divided among them."""

    whole: float
    cut: float
    products: float  # what matrix products and attention gave, which selective recomputation keeps


def layer_activations(
    config: PreTrainedConfig, *, seq_len: int, dtype: torch.dtype, attention: str, fake: bool = True
) -> tuple[LayerBytes, ...]:
    """Saved bytes of every decoder layer for one sequence. `fake=False` computes for real, to hold the other against.

    One layer of each kind runs; in families whose layers cannot be left out, all do.
    """
    try:
        return _measure(config, seq_len, dtype, attention, fake, every_layer=False)
    except Exception:  # whatever a family's own code raises over a placeholder; over its own layers it is the user's to see
        return _measure(config, seq_len, dtype, attention, fake, every_layer=True)


def _measure(
    config: PreTrainedConfig, seq_len: int, dtype: torch.dtype, attention: str, fake: bool, *, every_layer: bool
) -> tuple[LayerBytes, ...]:
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext(), _without_packing():
        causal = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).train()
        stack = find_stack(causal)
        layers = causal.get_submodule(stack.layers)
        kinds = list(range(len(layers))) if every_layer else [_kind(layer) for layer in layers]
        for index, layer in enumerate(layers):
            if kinds.index(kinds[index]) < index:
                layers[index] = Placeholder(layer, as_tuple=config.model_type in TUPLE_LAYERS)
        saved, products = _saved_by_layer(causal, layers, {kinds.index(kind) for kind in kinds}, stack.base, seq_len)
        own = {parameter.untyped_storage()._cdata for parameter in causal.parameters()}
        width = config.get_text_config().hidden_size
        measured = {index: _layer_bytes(tensors, products[index], own, width) for index, tensors in saved.items()}
    return tuple(measured[kinds.index(kind)] for kind in kinds)


def _kind(layer: nn.Module) -> tuple:
    """Layers of one kind save alike: same class, same parts, same shapes, same attention."""
    parts = tuple(
        (name, type(module).__name__, getattr(module, "sliding_window", None)) for name, module in layer.named_modules()
    )
    return type(layer).__name__, parts, tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())


def _saved_by_layer(
    causal: nn.Module, layers: nn.ModuleList, chosen: set[int], base: str, seq_len: int
) -> tuple[dict[int, list[torch.Tensor]], dict[int, list[torch.Tensor]]]:
    """By layer: what autograd saves, and what products give."""
    saved: dict[int, list[torch.Tensor]] = {index: [] for index in chosen}
    products: dict[int, list[torch.Tensor]] = {index: [] for index in chosen}
    open_layer: list[int] = []
    kept = product_ops()

    class SeeProducts(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, kinds: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
            out = op(*args, **(kwargs or {}))
            if op in kept and open_layer:
                products[open_layer[0]] += [each for each in tree_leaves(out) if isinstance(each, torch.Tensor)]
            return out

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if open_layer:
            saved[open_layer[0]].append(tensor)
        return tensor

    for index in chosen:
        layers[index].register_forward_pre_hook(lambda *_, index=index: open_layer.append(index))
        layers[index].register_forward_hook(lambda *_: open_layer.clear())
    ids = torch.zeros(1, seq_len, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), SeeProducts():
        causal.get_submodule(base)(input_ids=ids, use_cache=False)
    return saved, products


def _layer_bytes(tensors: list[torch.Tensor], products: list[torch.Tensor], parameters: set[int], width: int) -> LayerBytes:
    """Storages once each. What is as wide as the hidden states lies between blocks, where every tensor rank has it whole."""
    whole = cut = 0.0
    seen = set(parameters)
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata in seen:
            continue
        seen.add(storage._cdata)
        between = tensor.ndim < 4 and tensor.shape[-1:] in ((width,), (1,))
        whole, cut = (whole + storage.nbytes(), cut) if between else (whole, cut + storage.nbytes())
    given = {tensor.untyped_storage()._cdata: float(tensor.untyped_storage().nbytes()) for tensor in products}
    return LayerBytes(whole=whole, cut=cut, products=sum(given.values()))


@contextmanager
def _without_packing() -> Iterator[None]:
    """transformers looks into the positions for packed documents, which tensors without values cannot answer, and then keeps a
    mask [seq_len, seq_len] that a real run of whole sequences does not have."""
    name = "find_packed_sequence_indices"
    original = getattr(masking_utils, name)
    setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, original)
