"""Routes the matrix products of plain linears: to the faster library, and weight gradients to a store that computes them later.

On CPUs fp32 products go through oneDNN, the library that torch itself uses for bf16: torch's own fp32 linear calls MKL, which on
an AMD EPYC was 2.2 times slower (112 against 250 GFLOP/s a core; `tests.bench.step` shows steps with both). On Intel's own CPUs
MKL is the faster one (a Xeon with AVX-512: 160 against 148 forward, 155 against 125 for weights). There, on GPUs, and in
every other precision, a product is torch's own; of linears that are marked for it, in fp8. A deferred weight gradient is the same
product, accumulated in autograd's order, so that it is equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from recipes.common.model.expert_banks import find_banks
from recipes.common.model.fp8 import Fp8Products
from recipes.common.model.gradient_sums import GradientSums
from recipes.common.model.input_gradients import InputGradient, entrance
from recipes.common.model.shared_inputs import Reads
from recipes.common.model.weight_grad_store import Factor, Product, WeightGradStore, transposed
from recipes.common.runtime.processor import is_intel

Linear = nn.Linear | Conv1D
Store = WeightGradStore | GradientSums

# Linears that read what their neighbours read. Exact names of transformers 5; others only miss that their gradients are summed
_READERS = frozenset({"q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa", "gate_proj", "up_proj"})


def is_plain(module: nn.Module) -> bool:
    """Return whether it is a linear whose forward pass is the product alone: no subclass."""
    return type(module) in (nn.Linear, Conv1D)


def plain_linears(module: nn.Module) -> list[Linear]:
    return [inner for inner in module.modules() if is_plain(inner)]


def route_products(module: nn.Module, *, by_torch: bool = False) -> None:
    """Route the forward of every plain linear in `module` through `linear`. Call it before tensor parallelism wraps forwards.

    by_torch: use torch's own products, on CPUs too.
    """
    for inner in plain_linears(module):
        inner.forward, inner.by_torch = partial(linear, inner), by_torch


def defer_weight_gradients(module: nn.Module, store: Store | None) -> None:
    """Put the weight gradients of the plain linears in `module`, itself too, which `route_products` has routed, into `store`.

    None: they are autograd's from now on.
    """
    for inner in plain_linears(module):
        inner.weight_grad_store = store


def keep_factors(
    module: Linear,
    *,
    inputs: Callable[[torch.Tensor], Factor] | None = None,
    gradients: Callable[[torch.Tensor], Factor] | None = None,
) -> None:
    """Let what these return of a linear's inputs [n, in], or of its outputs' gradients [n, out], wait for its weight gradient."""
    module.keep_inputs, module.keep_gradients = inputs, gradients


def sum_input_gradients(layer: nn.Module) -> None:
    """Let neighbouring linears that read one tensor add up its gradient. Call it before the modules' forwards are wrapped.

    Not a layer's last linear: when a recomputed layer runs again, torch stops before that one's product, and not if we save.
    """
    for parent in layer.modules():
        own = [child for name, child in parent.named_children() if name in _READERS and is_plain(child)]
        if len(own) > 1:
            enter = entrance(parent)
            for each in own:
                each.enter_input = enter


def deferrable_fraction(module: nn.Module) -> float:
    """Return the fraction of `module`'s parameters whose gradients can be deferred; the others fill no bubble."""
    weights = [inner.weight for inner in plain_linears(module)] + [bank for _, bank in find_banks(module)]
    return sum(weight.numel() for weight in weights) / sum(p.numel() for p in module.parameters())


def linear(module: Linear, x: torch.Tensor, *, with_bias: bool = True) -> torch.Tensor:
    """Compute a linear of x [..., in], or its product alone.

    The weight's gradient is left to that of `x` if the module shares it, or else deferred if the module has a store.
    """
    bias, products = module.bias if with_bias else None, _products_of(module, x)
    if torch.is_grad_enabled():
        shared, store = getattr(module, "shared_input", None), getattr(module, "weight_grad_store", None)
        reads = shared.reads_of(module, x) if shared is not None else None
        enter = getattr(module, "enter_input", None)
        x, total = (x, None) if enter is None or not x.requires_grad else enter(x)
        if reads is not None:
            return _ReadingLinear.apply(x, bias, module, reads, products, total)
        if store is not None and module.weight.requires_grad and x.requires_grad:
            return _DeferredLinear.apply(x, bias, module, store, products, total)
        if products is not _TORCH or total is not None:
            return _Linear.apply(x, _matrix(module), bias, products, total)
    return products.forward(x, _matrix(module), bias)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Compute left @ right of two matrices by oneDNN, which accepts no empty ones."""
    if not left.numel() or not right.numel():
        return left @ right
    return torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")


def _by_onednn(x: torch.Tensor) -> bool:
    here = x.device.type == "cpu" and x.dtype == torch.float32
    return here and torch.backends.mkldnn.is_available() and not is_intel()


def _matrix(module: Linear) -> torch.Tensor:
    """Return the weight as [out, in]; Conv1D stores [in, out]."""
    return module.weight.t() if isinstance(module, Conv1D) else module.weight


def _torch_forward(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, matrix, bias)  # by name when it is called: DeepSpeed exchanges it


def _onednn_forward(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if not x.numel():
        return F.linear(x, matrix, bias)
    return torch.ops.mkldnn._linear_pointwise(x, matrix, bias, "none", [], "")


@dataclass(frozen=True)
class _Products:
    """What computes a linear, and the gradients of its input and its weight."""

    forward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
    of_input: Product
    of_weight: Product


Products = _Products | Fp8Products
_TORCH, _ONEDNN = _Products(_torch_forward, torch.mm, torch.mm), _Products(_onednn_forward, product, product)


def _products_of(module: Linear, x: torch.Tensor) -> Products:
    if getattr(module, "in_fp8", False):
        with torch.no_grad():
            return Fp8Products(x, module.weight)
    return _ONEDNN if _by_onednn(x) and not getattr(module, "by_torch", False) else _TORCH


def _no_view(result: torch.Tensor) -> torch.Tensor:
    """Return the same tensor to autograd as one of its own: a family may scale what a linear gives in place."""
    return result.data if result._is_view() else result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, products: Products, total: InputGradient | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, matrix)
        ctx.products, ctx.total = products, total
        return _no_view(products.forward(x, matrix, bias))

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        x, matrix = ctx.saved_tensors
        rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        wanted = ctx.needs_input_grad
        return (
            _input_gradient(ctx, grads, matrix, x.shape) if wanted[0] else None,
            ctx.products.of_weight(grads.t(), rows) if wanted[1] else None,
            grads.sum(0) if wanted[2] else None,
            None,
            None,
        )


class _DeferredLinear(torch.autograd.Function):
    """A linear whose backward pass puts the weight's gradient into a store.

    The weight comes with its module. As an input, the backward pass would visit it without a gradient, and its hooks would run;
    saved with x, recomputation would return a copy, whose gradient may never reach the weight.
    """

    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        bias: nn.Parameter | None,
        module: Linear,
        store: Store,
        products: Products,
        total: InputGradient | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.module, ctx.store, ctx.products, ctx.total = module, store, products, total
        return _no_view(products.forward(x, _matrix(module), bias))

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        x, module = ctx.saved_tensors[0], ctx.module
        rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        inputs, outputs = _kept(module, "keep_inputs", rows), _kept(module, "keep_gradients", grads)
        factors = (transposed(inputs), outputs) if isinstance(module, Conv1D) else (transposed(outputs), inputs)
        ctx.store.put(module.weight, *factors, ctx.products.of_weight)
        grad_bias = grads.sum(0) if ctx.needs_input_grad[1] else None
        return _input_gradient(ctx, grads, _matrix(module), x.shape), grad_bias, None, None, None, None


def _input_gradient(ctx: Any, grads: torch.Tensor, matrix: torch.Tensor, shape: Sequence[int]) -> torch.Tensor | None:
    """Return grads @ matrix as `shape`, or nothing where it is added to a sum that several linears share."""
    if ctx.total is None:
        return ctx.products.of_input(grads, matrix).view(shape)
    ctx.total.add(grads, matrix, ctx.products.of_input)
    return None


class _ReadingLinear(torch.autograd.Function):
    """A linear whose backward pass leaves the weight's gradient to that of its input, which it therefore need not save."""

    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        bias: nn.Parameter | None,
        module: Linear,
        reads: Reads,
        products: Products,
        total: InputGradient | None,
    ) -> torch.Tensor:
        ctx.module, ctx.reads, ctx.products, ctx.total = module, reads, products, total
        return _no_view(products.forward(x, _matrix(module), bias))

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        module, grads = ctx.module, grad.reshape(-1, grad.shape[-1])
        ctx.reads.leave(module.weight, grads, ctx.products.of_weight, inputs_first=isinstance(module, Conv1D))
        grad_bias = grads.sum(0) if ctx.needs_input_grad[1] else None
        matrix = _matrix(module)
        shape = (*grad.shape[:-1], matrix.shape[1])
        return _input_gradient(ctx, grads, matrix, shape), grad_bias, None, None, None, None


def _kept(module: Linear, way: str, rows: torch.Tensor) -> Factor:
    keep = getattr(module, way, None)
    return rows if keep is None else keep(rows)
