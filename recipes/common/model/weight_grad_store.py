"""Stores weight gradients that a zero-bubble schedule computes later, when a rank would otherwise wait.

It knows weights and the factors of their gradients, not the modules that use them (`linears` puts them here) nor when a schedule
computes them (`pipeline.executor`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
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


Parts = list[tuple[Factor, Factor, Product]]  # of one gradient: several where the model uses a weight twice


class WeightGradStore:
    """Weight gradients not computed yet, each as its two factors, by micro batch in the order of the backward passes."""

    def __init__(self) -> None:
        self._micro_batches: deque[dict[nn.Parameter, Parts]] = deque()
        self.weights: set[nn.Parameter] = set()  # all that have ever been put here
        self._used_again: set[nn.Parameter] = set()  # those that a micro batch has used several times
        self._at_once: Collection[nn.Parameter] = ()

    def __len__(self) -> int:
        """Count the micro batches whose gradients are not computed yet."""
        return len(self._micro_batches)

    def begin(self) -> None:
        """Let the backward pass of the next micro batch put its gradients."""
        self._micro_batches.append({})

    @contextmanager
    def at_once(self, weights: Collection[nn.Parameter]) -> Iterator[None]:
        """Compute the gradients of these weights that a backward pass puts meanwhile, beside which the next one's factors come.

        That is for a pass for which nobody waits: its first weights have their gradients before its end. What a micro batch
        before has used several times is left: how often this one does is not known.
        """
        self._at_once = frozenset(weights) - self._used_again
        try:
            yield
        finally:
            self._at_once = ()

    def all_have_sums(self) -> bool:
        """Return whether it is known that no weight's gradient goes through autograd."""
        return bool(self.weights) and all(main_grad_of(weight) is not None for weight in self.weights)

    def put(self, weight: nn.Parameter, left: Factor, right: Factor, product: Product) -> None:
        """Defer the gradient of `weight`, which is product(left, right)."""
        assert self._micro_batches, "a backward pass that no schedule began: its weight gradients would be lost"
        newest = self._micro_batches[-1]
        parts = newest.setdefault(weight, [])
        parts.append((left, right, product))
        self.weights.add(weight)
        if self._at_once:
            _start(parts[-1:])
            due = [each for each in newest if each is not weight and each in self._at_once]
            for each in due:
                _compute(each, newest.pop(each), ends=True)

    @torch.no_grad()
    def compute_oldest(self, micro_batches: int = 1) -> None:
        """Compute and accumulate the weight gradients of the oldest micro batches, the last layer's first, as autograd does.

        Each is added to its weight's sum, or goes to its weight through autograd, so that hooks run (tensor ranks sum), and is
        freed before the next one is computed. While a product is computed, the next one's factors are fetched. A weight has all
        of its gradients, in the micro batches' order, before the next weight.
        """
        oldest = [self._micro_batches.popleft() for _ in range(micro_batches)]
        self._used_again.update(weight for deferred in oldest for weight, parts in deferred.items() if len(parts) > 1)
        weights = dict.fromkeys(weight for deferred in oldest for weight in deferred)
        work = deque((weight, deferred.pop(weight)) for weight in weights for deferred in oldest if weight in deferred)
        while work:
            weight, parts = work.popleft()
            following = work[0] if work else (None, [])
            _compute(weight, parts, following[1], ends=following[0] is not weight)


def _compute(weight: nn.Parameter, parts: Parts, following: Sequence[tuple[Factor, Factor, Product]] = (), *, ends: bool) -> None:
    """Add a micro batch's gradient to its weight's. following: what is computed next. ends: it is the weight's last for now."""
    main_grad, gradient = main_grad_of(weight), None
    while parts:  # autograd, too, sums several before it accumulates
        left, right, product = parts.pop(0)
        left, right = _given(left), _given(right)
        _start(parts or following)
        if main_grad is not None:
            main_grad.add_product(left, right, product)
        else:
            part = product(left, right)
            gradient = part if gradient is None else gradient + part
        del left, right
    if main_grad is None:
        torch.autograd.backward([weight], [gradient])
    elif ends:
        main_grad.added()


class _Transposed:
    def __init__(self, factor: LateFactor) -> None:
        self.start, self._factor = factor.start, factor

    def __call__(self) -> torch.Tensor:
        return self._factor().t()


def transposed(factor: Factor) -> Factor:
    return factor.t() if isinstance(factor, torch.Tensor) else _Transposed(factor)


def _given(factor: Factor) -> torch.Tensor:
    return factor if isinstance(factor, torch.Tensor) else factor()


def _start(factors: Sequence[tuple[Factor, Factor, Product]]) -> None:
    """Begin to fetch the factors of the first of these products."""
    for factor in factors[0][:2] if factors else ():
        if not isinstance(factor, torch.Tensor):
            factor.start()
