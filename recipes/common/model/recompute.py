"""Recomputes layers in the backward pass (activation checkpointing, arXiv 1604.06174).

Full recomputation keeps a layer's input and runs the whole layer again. Selective recomputation also keeps the results of matrix
products and attention, and runs again only what lies between them: elementwise work and norms, which are cheap and hold most of
the memory (Megatron's, arXiv 2205.05198 section 5, repeats attention, which today's attention kernels do by themselves). Sums
over tensor ranks are repeated in both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from recipes.common.runtime.step_clock import CLOCK, RECOMPUTE

_NAMES = (
    "aten.mm",
    "aten.addmm",
    "aten.bmm",
    "aten.baddbmm",
    "aten._grouped_mm",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._flash_attention_forward",
    "aten._efficient_attention_forward",
    "mkldnn._linear_pointwise",
)


def product_ops() -> frozenset[Any]:
    """Return the operators whose results are kept, those of them that this torch has."""
    found = set()
    for name in _NAMES:
        space, _, op = name.partition(".")
        packet = getattr(getattr(torch.ops, space), op, None)
        found |= {getattr(packet, overload) for overload in packet.overloads()} if packet is not None else set()
    return frozenset(found)


def recompute(layer: nn.Module, *, keep_products: bool) -> None:
    """Let `layer` run again in the backward pass, all of it or all but its products."""
    options: dict[str, Any] = {}
    if keep_products:
        policy = partial(_policy, product_ops())
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    layer.forward = computed_again(layer.forward, **options)


def computed_again(forward: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Return `forward`, of which only the arguments are kept for its backward pass. options: of torch's `checkpoint`."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        with CLOCK.span(RECOMPUTE):
            return forward(*args, **kwargs)

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(timed, *args, use_reentrant=False, **options, **kwargs)

    return run


def _policy(kept: frozenset[Any], context: Any, op: Callable, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE
