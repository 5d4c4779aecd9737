"""Weight gradients that wait.

A pipeline stage owes the stage before it the input's gradient alone; the other half of the work can wait for a moment in which
the stage would be idle (zero-bubble schedules, arXiv 2401.10241). What comes here are the products of linears
(`recipes.common.linears`); everything else keeps its ordinary backward pass: norms, biases, embeddings, the head (its gradients
are computed with the loss) and experts that are no linears.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import nn

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class WeightQueue:
    """The weight gradients that wait, each as its two factors, by micro batch in the order of the backward passes."""

    def __init__(self) -> None:
        self._waiting: deque[dict[nn.Parameter, list[tuple[torch.Tensor, torch.Tensor, Product]]]] = deque()

    def __len__(self) -> int:
        """How many micro batches wait."""
        return len(self._waiting)

    def begin(self) -> None:
        """The backward pass of the next micro batch follows."""
        self._waiting.append({})

    def put_off(self, weight: nn.Parameter, left: torch.Tensor, right: torch.Tensor, product: Product) -> None:
        """The gradient of `weight` is product(left, right)."""
        assert self._waiting, "a backward pass that no schedule began: its weight gradients would be lost"
        self._waiting[-1].setdefault(weight, []).append((left, right, product))

    def make_up(self) -> None:
        """Compute and accumulate the weight gradients of the micro batch that has waited longest.

        Each goes to its weight through autograd, so that hooks run (tensor ranks sum, DeepSpeed adds up in fp32), and is let
        go before the next one is computed.
        """
        waiting = self._waiting.popleft()
        while waiting:
            weight, factors = waiting.popitem()
            gradient = None
            while factors:  # several where the model uses a weight twice; autograd, too, sums them before it accumulates
                left, right, product = factors.pop(0)
                part = product(left, right)
                gradient = part if gradient is None else gradient + part
            torch.autograd.backward([weight], [gradient])
