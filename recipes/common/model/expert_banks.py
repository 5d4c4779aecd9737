"""Puts the weight gradients of banks of experts into a store that computes them later, as `linears` does those of linears.

transformers computes all experts of a module by grouped products, x [rows, in] with a bank [experts, out, in], the rows of each
expert one after another. While such a module runs, its products are exchanged for ones whose backward pass keeps the two factors
of the bank's gradient: another grouped product, over the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from recipes.common.model.weight_grad_store import WeightGradStore

_MARK = "_is_expert_parallel"  # of every module of experts whose products transformers computes as its config says


def find_banks(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """Yield (module of experts, bank) of every bank in `module`."""
    for inner in module.modules():
        if hasattr(inner, _MARK) and getattr(inner.config, "_experts_implementation", None) == "grouped_mm":
            yield from ((inner, bank) for bank in inner.parameters(recurse=False) if bank.ndim == 3)


def defer_bank_gradients(module: nn.Module, store: WeightGradStore) -> None:
    """Put the gradients of the banks in `module` into `store`. Call it before other forwards of the experts are wrapped."""
    for experts in dict.fromkeys(owner for owner, _ in find_banks(module)):
        experts.forward = partial(_run, experts.forward, experts, store)


def _run(forward: Callable[..., Any], experts: nn.Module, store: WeightGradStore, *args: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **named)
    with _Deferring(experts, store):
        return forward(*args, **named)


class _Deferring(TorchFunctionMode):
    """Exchanges the grouped products with one module's banks."""

    def __init__(self, experts: nn.Module, store: WeightGradStore) -> None:
        super().__init__()
        self._banks = {id(bank): bank for _, bank in find_banks(experts) if bank.requires_grad}
        self._store = store

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch._grouped_mm and len(args) == 2 and args[0].requires_grad:
            x, matrices = args
            bank = self._banks.get(id(matrices if matrices._base is None else matrices._base))
            if bank is not None:
                return _DeferredProduct.apply(x, _Bank(bank, matrices is not bank, self._store), kwargs["offs"])
        return func(*args, **kwargs)


class _Bank(NamedTuple):
    """A bank, as autograd does not see it: hooks of a backward pass that visits it would run before it has its gradient."""

    parameter: nn.Parameter
    transposed: bool
    store: WeightGradStore


class _DeferredProduct(torch.autograd.Function):
    """A grouped product whose backward pass puts the bank's gradient into a store: see `linears`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bank: _Bank, offsets: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, offsets)
        ctx.bank = bank
        return torch._grouped_mm(x, _matrices(bank.parameter, bank.transposed), offs=offsets)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (x, offsets), bank = ctx.saved_tensors, ctx.bank
        factors = (grad.t(), x) if bank.transposed else (x.t(), grad)
        bank.store.put(bank.parameter, *factors, partial(_gradient, offsets))
        return torch._grouped_mm(grad, _matrices(bank.parameter, not bank.transposed), offs=offsets), None, None


def _matrices(bank: nn.Parameter, transposed: bool) -> torch.Tensor:
    return bank.detach().transpose(-2, -1) if transposed else bank.detach()


def _gradient(offsets: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch._grouped_mm(left, right, offs=offsets)
