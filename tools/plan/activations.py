"""Measures what each layer saves for its backward pass: runs the model forward on tensors that have shapes but no memory.

Every storage that autograd saves is counted once, so no family, attention or precision needs a formula. A 70B model takes about
a second on one core.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig

from recipes.common.model.decoder import find_stack
from recipes.common.model.document_bounds import no_questions
from recipes.common.model.fusion import fuse_layer
from recipes.common.model.recompute import product_ops
from recipes.common.pipeline.placeholders import Placeholder

TRAFFIC_PER_SAVED = 6.0  # bytes moved a saved byte: each is written and read about three times


@dataclass(frozen=True, kw_only=True)
class LayerBytes:
    """Bytes that one layer saves of one sequence."""

    whole: float  # on every tensor rank
    sharded: float  # over the tensor ranks
    products: float  # outputs of matrix products and attention, which selective recomputation keeps


def layer_activations(
    config: PreTrainedConfig, *, seq_len: int, dtype: torch.dtype, attention: str, kernels: str = "none", fake: bool = True
) -> tuple[LayerBytes, ...]:
    """Return the saved bytes of every decoder layer for one sequence. `fake=False` computes with real tensors, for comparison.

    One layer of each kind runs; all do in families whose layers cannot be replaced by placeholders.
    """
    try:
        return _measure(config, seq_len, dtype, attention, kernels, fake, every_layer=False)
    except Exception:  # a family's code may raise anything over a placeholder; over its own layers it reaches the user
        return _measure(config, seq_len, dtype, attention, kernels, fake, every_layer=True)


def _measure(
    config: PreTrainedConfig, seq_len: int, dtype: torch.dtype, attention: str, kernels: str, fake: bool, *, every_layer: bool
) -> tuple[LayerBytes, ...]:
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext(), no_questions(documents=False):
        causal = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        ).train()
        stack = find_stack(causal)
        layers = causal.get_submodule(stack.layers)
        kinds = list(range(len(layers))) if every_layer else [_kind(layer) for layer in layers]
        for index, layer in enumerate(layers):
            if kinds.index(kinds[index]) < index:
                layers[index] = Placeholder(layer)
            elif kernels == "compile":
                fuse_layer(layer)
        layers[0].register_forward_hook(lambda layer, args, output: _return_alike(layers, output))
        saved, products = _saved_by_layer(causal, layers, {kinds.index(kind) for kind in kinds}, stack.base, seq_len)
        own = {parameter.untyped_storage()._cdata for parameter in causal.parameters()}
        width = config.get_text_config().hidden_size
        measured = {index: _layer_bytes(tensors, products[index], own, width) for index, tensors in saved.items()}
    return tuple(measured[kinds.index(kind)] for kind in kinds)


def _return_alike(layers: nn.ModuleList, output: Any) -> None:
    """Let placeholders return what a layer returns: hidden states, or a tuple that begins with them."""
    for layer in layers:
        if isinstance(layer, Placeholder):
            layer.outputs = len(output) if isinstance(output, tuple) else 0


def _kind(layer: nn.Module) -> tuple:
    """Identify layers that save the same bytes: same class, submodules, shapes and attention window."""
    parts = tuple(
        (name, type(module).__name__, getattr(module, "sliding_window", None)) for name, module in layer.named_modules()
    )
    return type(layer).__name__, parts, tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())


def _saved_by_layer(
    causal: nn.Module, layers: nn.ModuleList, chosen: set[int], base: str, seq_len: int
) -> tuple[dict[int, list[torch.Tensor]], dict[int, list[torch.Tensor]]]:
    """Return by layer (tensors that autograd saves, outputs of products)."""
    saved: dict[int, list[torch.Tensor]] = {index: [] for index in chosen}
    products: dict[int, list[torch.Tensor]] = {index: [] for index in chosen}
    open_layer: list[int] = []
    kept = product_ops()

    class RecordProducts(TorchDispatchMode):
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
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), RecordProducts():
        causal.get_submodule(base)(input_ids=ids, use_cache=False)
    return saved, products


def _layer_bytes(tensors: list[torch.Tensor], products: list[torch.Tensor], parameters: set[int], width: int) -> LayerBytes:
    """Count each storage once. Tensors as wide as the hidden states lie between blocks: every tensor rank has them whole."""
    whole = sharded = 0.0
    seen = set(parameters)
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata in seen:
            continue
        seen.add(storage._cdata)
        between = tensor.ndim < 4 and tensor.shape[-1:] in ((width,), (1,))
        if between:
            whole += storage.nbytes()
        else:
            sharded += storage.nbytes()
    outputs = {tensor.untyped_storage()._cdata: float(tensor.untyped_storage().nbytes()) for tensor in products}
    return LayerBytes(whole=whole, sharded=sharded, products=sum(outputs.values()))
