"""Adds up in fp32 the gradients that a micro batch's parts have of the same weights: the head's, a chunk of tokens at a time.

A product's gradient goes into its sum inside the product, on a GPU: it is never rounded, nor written by itself. The sum is the
micro batch's, or at once the step's, where it is known by what the micro batch's would be multiplied. The step's may have the
last part's products later: in a pipeline other ranks wait for the gradient of the head's input, and none for its weight's.
"""

from __future__ import annotations

import torch
from torch import nn

from recipes.common.model.main_grads import Product, add_product, main_grad_of


class GradientSums:
    """fp32 sums of gradients, by parameter."""

    def __init__(self) -> None:
        self._sums: dict[nn.Parameter, torch.Tensor] = {}

    def put(self, weight: nn.Parameter, left: torch.Tensor, right: torch.Tensor, product: Product) -> None:
        """Add product(left, right) to the sum of `weight`; `linears` puts them here as into a WeightGradStore."""
        known = self._sums.get(weight)
        if known is None:
            self._sums[weight] = _first_product(left, right, product)
        else:
            add_product(known, left, right, product)

    def add(self, weight: nn.Parameter, gradient: torch.Tensor) -> None:
        """Add a gradient that nobody else holds to the sum of `weight`."""
        known = self._sums.get(weight)
        if known is None:
            self._sums[weight] = gradient.float()
        else:
            known.add_(gradient)

    def begin_last_part(self) -> None:
        """Hear that the gradients to come are a micro batch's last."""

    def take(self, parameters: list[nn.Parameter]) -> list[torch.Tensor | None]:
        """Return the sums of `parameters`, None where there is none, and forget them."""
        taken = [self._sums.pop(parameter, None) for parameter in parameters]
        assert not self._sums, "a gradient of another parameter"
        return taken


class StepSums:
    """The sums that the weights have of a whole step, in the place of GradientSums."""

    def __init__(self, *, late: bool = False) -> None:
        """late: products of a micro batch's last part wait until `finish`."""
        self._late, self._in_last_part = late, False
        self._waiting: list[tuple[nn.Parameter, torch.Tensor, torch.Tensor, Product]] = []

    @property
    def waiting(self) -> frozenset[nn.Parameter]:
        """Return the weights whose sums lack a product."""
        return frozenset(weight for weight, *_ in self._waiting)

    def put(self, weight: nn.Parameter, left: torch.Tensor, right: torch.Tensor, product: Product) -> None:
        self._waiting.append((weight, left, right, product))
        if not (self._late and self._in_last_part):
            self.finish()

    def begin_last_part(self) -> None:
        self._in_last_part = True

    @torch.no_grad()
    def finish(self) -> None:
        """Add the products that wait: they hold the logits' gradient of the last part."""
        self._in_last_part = False
        while self._waiting:
            weight, left, right, product = self._waiting.pop(0)
            main_grad_of(weight).add_product(left, right, product)

    def add(self, weight: nn.Parameter, gradient: torch.Tensor) -> None:
        main_grad_of(weight).add(gradient)

    def take(self, parameters: list[nn.Parameter]) -> list[None]:
        return [None] * len(parameters)


def _first_product(left: torch.Tensor, right: torch.Tensor, product: Product) -> torch.Tensor:
    if product is torch.mm and left.device.type == "cuda" and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return product(left, right).float()
