"""Gives a rank's own layers what a layout asks of them: deferred weight gradients, recomputation, MLPs by parts."""

from __future__ import annotations

from torch import nn

from recipes.common.config.placement import ONE_PASS
from recipes.common.model.expert_banks import defer_bank_gradients
from recipes.common.model.fusion import fuse_layer
from recipes.common.model.host_activations import HostActivations
from recipes.common.model.linears import defer_weight_gradients, route_products
from recipes.common.model.recompute import recompute
from recipes.common.model.token_chunks import chunk_tokens, find_mlp
from recipes.common.model.weight_grad_store import WeightGradStore
from recipes.common.recipe import Layout


def route_work(
    causal: nn.Module,
    own_layers: dict[int, nn.Module],
    chunks: tuple[range, ...],
    schedule: str,
    after: tuple[str, ...] = (),
    *,
    by_torch: bool,
    kernels: str,
) -> tuple[WeightGradStore, ...]:
    """Route products and fuse the work between them. Returns each chunk's store of weight gradients that are deferred.

    after: the names of what lies between the layers and the head.
    """
    stores = tuple(WeightGradStore() for _ in chunks) if schedule != ONE_PASS else ()
    route_products(causal, by_torch=by_torch)
    for chunk, store in zip(chunks, stores, strict=False):
        for index in chunk:
            defer_weight_gradients(own_layers[index], store)
            defer_bank_gradients(own_layers[index], store)
    if kernels == "compile":
        for module in (*own_layers.values(), *map(causal.get_submodule, after)):
            fuse_layer(module)
    return stores


def keep_less(own_layers: dict[int, nn.Module], chunks: tuple[range, ...], layout: Layout, recomputed: range) -> None:
    """Let MLPs run by parts of their tokens, and layers again in the backward pass, their inputs kept on the host if asked."""
    host = HostActivations()
    for index, layer in own_layers.items():
        if layout.mlp_chunk_tokens:
            chunk_tokens(find_mlp(layer), layout.mlp_chunk_tokens)
        if index in recomputed:
            recompute(layer, keep_products=layout.recompute == "selective")
            if layout.offload_activations:
                host.keep_inputs(layer, first=any(index == chunk[0] for chunk in chunks))
