"""Routes the matrix products of plain linears: to the faster library, and weight gradients to a store that computes them later.

On CPUs with AVX-512 that are not Intel's, fp32 products go through oneDNN, the library that torch itself uses for bf16: torch's
own fp32 linear calls MKL, which on such an AMD EPYC was 2.2 times slower (112 against 250 GFLOP/s a core; `tests.bench.step`
shows steps with both). Elsewhere MKL is at least as fast (a Xeon with AVX-512: 160 against 148 forward, 155 against 125 for
weights). There, on GPUs, and in every other precision, a product is torch's own; of linears that are marked for it, in fp8. A
deferred weight gradient is the same product, accumulated in autograd's order, so that it is equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from recipes.common.model.expert_banks import find_banks
from recipes.common.model.fp8 import Fp8Products
from recipes.common.model.gradient_sums import GradientSums, StepSums
from recipes.common.model.input_gradients import InputGradient, entrance
from recipes.common.model.main_grads import Product, main_grad_of
from recipes.common.model.shared_inputs import Reads
from recipes.common.model.weight_grad_store import Factor, WeightGradStore, transposed
from recipes.common.runtime.processor import onednn_is_faster

Linear = nn.Linear | Conv1D
Store = WeightGradStore | GradientSums | StepSums

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

    The weight's gradient is left to that of `x` if the module shares it, deferred if the module has a store, added to the sum
    that the weight has, or else autograd's.
    """
    told = vars(module)  # what a module does not have costs it an exception
    weight, bias, products = module.weight, module.bias if with_bias else None, _products_of(module, x)
    if not torch.is_grad_enabled():
        return products.forward(x, _matrix(module, weight), bias)
    shared, store, enter = told.get("shared_input"), told.get("weight_grad_store"), told.get("enter_input")
    reads = shared.reads_of(module, x) if shared is not None else None
    x, total = (x, None) if enter is None or not x.requires_grad else enter(x)
    if reads is not None:
        return _Linear.apply(x, None, bias, _Call(module, weight, products, total, reads=reads))
    if store is not None and weight.requires_grad and x.requires_grad:
        return _Linear.apply(x, None, bias, _Call(module, weight, products, total, store=store))
    if main_grad_of(weight) is not None:
        return _Linear.apply(x, weight, bias, _Call(module, weight, products, total, to_sum=True))
    if products is not _TORCH or total is not None:
        return _Linear.apply(x, _matrix(module, weight), bias, _Call(module, weight, products, total))
    return products.forward(x, _matrix(module, weight), bias)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Compute left @ right of two matrices by oneDNN, which accepts no empty ones."""
    if not left.numel() or not right.numel():
        return left @ right
    return torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")


def _by_onednn(x: torch.Tensor) -> bool:
    here = x.device.type == "cpu" and x.dtype == torch.float32
    return here and torch.backends.mkldnn.is_available() and onednn_is_faster()


def _matrix(module: Linear, weight: nn.Parameter) -> torch.Tensor:
    """Return the module's weight as [out, in]; Conv1D stores [in, out]."""
    return weight.t() if isinstance(module, Conv1D) else weight


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
    told = vars(module)
    if told.get("in_fp8"):
        with torch.no_grad():
            return Fp8Products(x, module.weight)
    return _ONEDNN if not told.get("by_torch") and _by_onednn(x) else _TORCH


def _no_view(result: torch.Tensor) -> torch.Tensor:
    """Return the same tensor to autograd as one of its own: a family may scale what a linear gives in place."""
    return result.data if result._is_view() else result


class _Call(NamedTuple):
    """One call of a linear, and where its weight's gradient goes: without a place to autograd."""

    module: Linear
    weight: nn.Parameter  # the module's, looked up once: modules are slow at that
    products: Products
    total: InputGradient | None  # to which its input's gradient is added
    reads: Reads | None = None  # to which it leaves its weight's
    store: Store | None = None  # which computes it
    to_sum: bool = False  # the weight's own

    def give_weight_gradient(self, rows: torch.Tensor | None, grads: torch.Tensor) -> None:
        """Give what the weight's gradient is computed from: the inputs [n, in], which `reads` has, and the outputs' [n, out]."""
        weight, turned, of_weight = self.weight, isinstance(self.module, Conv1D), self.products.of_weight
        if self.reads is not None:
            self.reads.leave(weight, grads, of_weight, inputs_first=turned)
        elif self.store is not None:
            inputs, outputs = _kept(self.module, "keep_inputs", rows), _kept(self.module, "keep_gradients", grads)
            self.store.put(weight, *((transposed(inputs), outputs) if turned else (transposed(outputs), inputs)), of_weight)
        else:
            main_grad_of(weight).add_product(*((rows.t(), grads) if turned else (grads.t(), rows)), of_weight)


class _Linear(torch.autograd.Function):
    """A linear.

    Its weight is an input where autograd has its gradient: as the matrix that it multiplies by; and where that goes to the
    weight's own sum: as the parameter, which the backward pass then visits without a gradient, so that its hooks know when all
    of a pass are there. Elsewhere it comes with its module: a hook would run too early, and saved with x, recomputation would
    return a copy, whose gradient may never reach the weight.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, call: _Call) -> torch.Tensor:
        autograds = weight is not None and not call.to_sum
        matrix = weight if autograds else _matrix(call.module, call.weight)
        ctx.call, ctx.autograds = call, autograds
        if call.reads is None:  # else the input has it
            ctx.save_for_backward(x, *([matrix] if autograds else []))
        return _no_view(call.products.forward(x, matrix, bias))

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        call, saved, needed = ctx.call, ctx.saved_tensors, ctx.needs_input_grad
        matrix = saved[1] if ctx.autograds else _matrix(call.module, call.weight)
        grads, of_input, of_weight = grad.reshape(-1, grad.shape[-1]), None, None
        rows = saved[0].reshape(-1, saved[0].shape[-1]) if saved else None
        if call.reads is not None:  # first, so that its input is fetched meanwhile
            call.give_weight_gradient(rows, grads)
        if needed[0] and call.total is not None:
            call.total.add(grads, matrix, call.products.of_input)
        elif needed[0]:
            of_input = call.products.of_input(grads, matrix).view(*grad.shape[:-1], matrix.shape[1])
        if not ctx.autograds and call.reads is None:
            call.give_weight_gradient(rows, grads)
        elif needed[1]:
            of_weight = call.products.of_weight(grads.t(), rows)
        return of_input, of_weight, grads.sum(0) if needed[2] else None, None


def _kept(module: Linear, way: str, rows: torch.Tensor) -> Factor:
    keep = vars(module).get(way)
    return rows if keep is None else keep(rows)
