"""Stores weight gradients that a zero-bubble schedule computes later, when a rank would otherwise wait.

It knows weights and the factors of their gradients, not the modules that use them (`linears` puts them here) nor when a schedule
computes them (`pipeline.executor`).
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import torch
from torch import nn

from recipes.common.model.main_grads import Product, main_grad_of


class LateFactor(Protocol):
    """What gives a factor when it is needed."""

    def start(self) -> None:
        """Begin to fetch it, beside what is computed."""

    def __call__(self) -> torch.Tensor: ...


Factor = torch.Tensor | LateFactor


class WeightGradStore:
    """Weight gradients not computed yet, each as its two factors, by micro batch in the order of the backward passes."""

    def __init__(self) -> None:
        self._micro_batches: deque[dict[nn.Parameter, list[tuple[Factor, Factor, Product]]]] = deque()
        self.weights: set[nn.Parameter] = set()  # all that have ever been put here

    def __len__(self) -> int:
        """Count the micro batches whose gradients are not computed yet."""
        return len(self._micro_batches)

    def begin(self) -> None:
        """Let the backward pass of the next micro batch put its gradients."""
        self._micro_batches.append({})

    def put(self, weight: nn.Parameter, left: Factor, right: Factor, product: Product) -> None:
        """Defer the gradient of `weight`, which is product(left, right)."""
        assert self._micro_batches, "a backward pass that no schedule began: its weight gradients would be lost"
        self._micro_batches[-1].setdefault(weight, []).append((left, right, product))
        self.weights.add(weight)

    def compute_oldest(self) -> None:
        """Compute and accumulate the weight gradients of the oldest micro batch, the last layer's first, as autograd does.

        Each is added to its weight's sum, or goes to its weight through autograd, so that hooks run (tensor ranks sum), and is
        freed before the next one is computed. While a product is computed, the next one's factors are fetched.
        """
        deferred = self._micro_batches.popleft()
        while deferred:
            weight = next(iter(deferred))
            factors, main_grad = deferred.pop(weight), main_grad_of(weight)
            gradient = None
            while factors:  # several where the model uses a weight twice; autograd, too, sums them before it accumulates
                left, right, product = factors.pop(0)
                left, right = _given(left), _given(right)
                _start(factors or next(iter(deferred.values()), []))
                if main_grad is not None:
                    main_grad.add_product(left, right, product)
                else:
                    part = product(left, right)
                    gradient = part if gradient is None else gradient + part
                del left, right
            if main_grad is not None:
                main_grad.added()
            else:
                torch.autograd.backward([weight], [gradient])


class _Transposed:
    def __init__(self, factor: LateFactor) -> None:
        self.start, self._factor = factor.start, factor

    def __call__(self) -> torch.Tensor:
        return self._factor().t()


def transposed(factor: Factor) -> Factor:
    return factor.t() if isinstance(factor, torch.Tensor) else _Transposed(factor)


def _given(factor: Factor) -> torch.Tensor:
    return factor if isinstance(factor, torch.Tensor) else factor()


def _start(factors: list[tuple[Factor, Factor, Product]]) -> None:
    """Begin to fetch the factors of the first of these products."""
    for factor in factors[0][:2] if factors else ():
        if not isinstance(factor, torch.Tensor):
            factor.start()
