"""Recomputes layers in the backward pass (activation checkpointing, arXiv 1604.06174).

Full recomputation keeps a layer's input and runs the whole layer again. Selective recomputation also keeps the results of matrix
products and attention, and runs again only what lies between them: elementwise work and norms, which are cheap and hold most of
the memory (Megatron's, arXiv 2205.05198 section 5, repeats attention, which today's attention kernels do by themselves). Sums
over tensor ranks are repeated in both.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import checkpoint

from recipes.common.runtime.step_clock import CLOCK, RECOMPUTE

_NAMES = (
    "aten.mm",
    "aten.addmm",
    "aten.bmm",
    "aten.baddbmm",
    "aten._grouped_mm",
    "aten._scaled_mm",
    "aten._scaled_mm_v2",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._flash_attention_forward",
    "torch_attn._varlen_attn",
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
        options["context_fn"] = lambda: _keep_and_reuse(product_ops())
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


Results = defaultdict[Any, deque[tuple[list[Any], TreeSpec]]]  # of each operator, in the order of its calls


def _keep_and_reuse(ops: frozenset[Any]) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Return what keeps the results of `ops` in a forward pass, and what gives them back when it runs again.

    torch's own (`create_selective_checkpoint_contexts`) keeps no copy of a result that the model overwrites: it then refuses to
    run again, or, where the result was viewed in between, takes what was written over it, and gradients are wrong.
    """
    results: Results = defaultdict(deque)
    return _Keep(ops, results), _Reuse(ops, results)


class _Keep(TorchDispatchMode):
    def __init__(self, ops: frozenset[Any], results: Results) -> None:
        super().__init__()
        self._ops, self._results = ops, results
        self._of_storage: dict[int, tuple[list[Any], int]] = {}  # where a result is kept, while the forward pass runs

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # compiled functions hold no products

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _overwritten(op, args, kwargs):
            if kept := self._of_storage.pop(tensor.untyped_storage()._cdata, None):
                leaves, index = kept
                leaves[index] = leaves[index].clone()
        out = op(*args, **kwargs)
        if op in self._ops:
            leaves, spec = tree_flatten(out)
            for index, leaf in enumerate(leaves):
                if isinstance(leaf, torch.Tensor):
                    leaves[index] = leaf.detach()  # the result itself would keep its graph
                    self._of_storage[leaf.untyped_storage()._cdata] = leaves, index
            self._results[op].append((leaves, spec))
        return out

    def __exit__(self, *error: Any) -> None:
        self._of_storage.clear()  # the results go one by one as they are given back
        super().__exit__(*error)


class _Reuse(TorchDispatchMode):
    def __init__(self, ops: frozenset[Any], results: Results) -> None:
        super().__init__()
        self._ops, self._results = ops, results

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if op not in self._ops:
            return op(*args, **(kwargs or {}))
        return tree_unflatten(*self._results[op].popleft())


def _overwritten(op: Any, args: tuple, kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    if op is torch.ops.c10d.allreduce_.default:  # its schema does not say so
        yield from args[0]
    schema = getattr(op, "_schema", None)
    if schema is None or not schema.is_mutable:
        return
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
