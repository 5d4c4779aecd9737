"""Leaves weight gradients of plain linears that read one tensor to that tensor's own turn in the backward pass.

Queries, keys and values read one tensor, gate and up another. With tensor ranks its gradient is summed over them, and the weight
gradients are what a rank can compute meanwhile (`parallel.summed_inputs`). They are the same products, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from recipes.common.model.main_grads import Product, main_grad_of
from recipes.common.model.weight_grad_store import Factor, WeightGradStore, transposed


class _Left(NamedTuple):
    weight: nn.Parameter
    grads: torch.Tensor  # of the outputs, [n, out]
    product: Product
    inputs_first: bool  # the weight is stored as [in, out]


class Reads:
    """The reading of one tensor in one forward pass. The linears' backward passes leave their weight gradients' factors here."""

    def __init__(
        self, weights: Sequence[nn.Parameter], store: WeightGradStore | None, first: Callable[[], None] | None = None
    ) -> None:
        """weights: whose gradients `compute` returns. store: where `defer` puts them. first: called when the first is left."""
        self.weights, self.store, self._first = tuple(weights), store, first
        self._left: list[_Left] = []

    def __len__(self) -> int:
        return len(self._left)

    def leave(self, weight: nn.Parameter, grads: torch.Tensor, product: Product, *, inputs_first: bool) -> None:
        if not self._left and self._first is not None:
            self._first()
        self._left.append(_Left(weight, grads, product, inputs_first))

    def compute(self, rows: torch.Tensor) -> list[torch.Tensor | None]:
        """Return the gradients of `weights`, None where a linear was not run, or they are added to its weight's sum.

        rows: what all have read, [n, in].
        """
        found: dict[nn.Parameter, torch.Tensor] = {}
        while self._left:
            weight, grads, product, inputs_first = self._left.pop(0)
            factors = (rows.t(), grads) if inputs_first else (grads.t(), rows)
            if (main_grad := main_grad_of(weight)) is not None:
                main_grad.add_product(*factors, product)
                continue
            gradient, known = product(*factors), found.get(weight)  # known: of a linear that was run twice
            found[weight] = gradient if known is None else known + gradient
        return [found.pop(weight, None) for weight in self.weights]

    def defer(self, rows: Factor) -> None:
        """Put the gradients into the store."""
        while self._left:
            weight, grads, product, inputs_first = self._left.pop(0)
            factors = (transposed(rows), grads) if inputs_first else (grads.t(), rows)
            self.store.put(weight, *factors, product)


class SharedInput:
    """The input that plain linears share. While a forward pass runs, `become` says which tensor it is."""

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        """linears: which `linears.linear` computes."""
        self.linears = tuple(linears)
        self._now: tuple[torch.Tensor, Reads] | None = None
        for linear in self.linears:
            linear.shared_input = self

    def reads(self, first: Callable[[], None] | None = None) -> Reads:
        """Begin a reading. first: see Reads; a deferred gradient does without."""
        stores = [getattr(linear, "weight_grad_store", None) for linear in self.linears]
        store = stores[0] if stores else None
        assert all(each is store for each in stores), "linears of one layer, of which only some are deferred"
        if store is not None:
            return Reads([], store)
        return Reads([linear.weight for linear in self.linears if _waits(linear)], None, first)

    def become(self, tensor: torch.Tensor, reads: Reads) -> None:
        self._now = tensor, reads

    def forget(self) -> None:
        """Call it after the forward pass: a tensor must not outlive it here."""
        self._now = None

    def reads_of(self, linear: nn.Module, x: torch.Tensor) -> Reads | None:
        """Return the reading of `x` where that is the shared tensor, or the same elements as rows."""
        if self._now is None or not _waits(linear):
            return None
        tensor, reads = self._now
        same = x is tensor or (
            x._base is tensor and x.numel() == tensor.numel() and x.shape[-1] == tensor.shape[-1] and x.is_contiguous()
        )
        return reads if same else None


def _waits(linear: nn.Module) -> bool:
    # ZeRO 3 gives a weight its shape while its module runs
    return linear.weight.requires_grad and not hasattr(linear.weight, "ds_id")
