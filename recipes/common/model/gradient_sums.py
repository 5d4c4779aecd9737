"""Adds up in fp32 the gradients that a micro batch's parts have of the same weights: the head's, a chunk of tokens at a time.

A product's gradient goes into its sum inside the product, on a GPU: it is never rounded, nor written by itself. The sum is the
micro batch's, or at once the step's, where it is known by what the micro batch's would be multiplied.
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

    def take(self, parameters: list[nn.Parameter]) -> list[torch.Tensor | None]:
        """Return the sums of `parameters`, None where there is none, and forget them."""
        taken = [self._sums.pop(parameter, None) for parameter in parameters]
        assert not self._sums, "a gradient of another parameter"
        return taken


class StepSums:
    """The sums that the weights have of a whole step, in the place of GradientSums."""

    def put(self, weight: nn.Parameter, left: torch.Tensor, right: torch.Tensor, product: Product) -> None:
        main_grad_of(weight).add_product(left, right, product)

    def add(self, weight: nn.Parameter, gradient: torch.Tensor) -> None:
        main_grad_of(weight).add(gradient)

    def take(self, parameters: list[nn.Parameter]) -> list[None]:
        return [None] * len(parameters)


def _first_product(left: torch.Tensor, right: torch.Tensor, product: Product) -> torch.Tensor:
    if product is torch.mm and left.device.type == "cuda" and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return product(left, right).float()
