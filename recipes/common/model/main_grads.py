"""Adds weight gradients up in fp32 inside the products that compute them (Megatron's gradient accumulation fusion).

Autograd would write each product in 16 bits and hand it on, and a kernel of its own would add it to the step's fp32 sum: 12 bytes
for each parameter and micro batch, and a rounding. Here a weight has its sum by the name `main_grad`, as in Megatron;
linears, the head and the embedding give theirs to it. What others compute of the same weight is autograd's, and added to the
same sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

_NAME = "main_grad"

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class MainGrad:
    """A weight's gradient of a step so far."""

    def __init__(self, total: torch.Tensor, adding: Callable[[], bool], added: Callable[[], None]) -> None:
        """See `give_main_grad`."""
        self._total, self._adding, self.added = total, adding, added
        self.reached = False  # whether it has ever had a gradient

    def add_product(self, left: torch.Tensor, right: torch.Tensor, product: Product) -> None:
        """Add product(left, right), where autograd records nothing."""
        if self._begin():
            write_product(self._total, left, right, product)
        else:
            add_product(self._total, left, right, product)

    @torch.no_grad()
    def add(self, gradient: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        """Add a gradient, or gradient * scale, both fp32."""
        self._zero_at_first()
        if scale is None:
            self._total.add_(gradient)
        else:
            self._total.addcmul_(gradient, scale)

    @torch.no_grad()
    def spoil_unless(self, right: torch.Tensor) -> None:
        """Make the sum NaN where `right` [] is false: the step is refused as any other with NaNs, and nobody waits for it."""
        self._zero_at_first()
        self._total.view(-1)[:1].add_(torch.where(right, 0.0, torch.nan))

    @torch.no_grad()
    def add_rows(self, index: torch.Tensor, rows: torch.Tensor) -> None:
        """Add rows [n, width] to those that `index` [n] names, in the same order each time: on a GPU atomic sums have none."""
        self._zero_at_first()
        rows = rows.to(self._total.dtype)
        if rows.device.type == "cuda":
            self._total.index_put_((index,), rows, accumulate=True)
        else:
            self._total.index_add_(0, index, rows)

    def _zero_at_first(self) -> None:
        if self._begin():
            self._total.zero_()

    def _begin(self) -> bool:
        self.reached = True
        return self._adding()


def give_main_grad(
    weight: nn.Parameter, total: torch.Tensor, adding: Callable[[], bool], added: Callable[[], None] = lambda: None
) -> None:
    """Let products add to the step's sum of this weight's gradients, `total`, in fp32 and of its shape.

    adding: called before something is added; returns whether it is a step's first, which is written over what `total` has.
    added: called when all that was deferred of a micro batch is; where nothing is deferred, hooks of the weight tell. None may
    change its gradient: it would see none.
    """
    assert not weight._backward_hooks, "a hook that would not see the gradient"
    setattr(weight, _NAME, MainGrad(total, adding, added))


def main_grad_of(weight: torch.Tensor) -> MainGrad | None:
    return getattr(weight, _NAME, None)


@contextmanager
def autograds_gradients(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let autograd have all gradients of these weights meanwhile, for whoever looks at them one by one: whole steps alone."""
    known = {weight: main_grad for weight in weights if (main_grad := main_grad_of(weight)) is not None}
    for weight in known:
        delattr(weight, _NAME)
    try:
        yield
    finally:
        for weight, main_grad in known.items():
            setattr(weight, _NAME, main_grad)


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, product: Product) -> None:
    """Add product(left, right) to `total`, inside the product where that is torch's own and can: on a CPU not of 16 bits.

    Call it where autograd records nothing, as in a backward pass.
    """
    if product is not torch.mm:
        total.add_(product(left, right))
    elif left.dtype == total.dtype:
        torch.addmm(total, left, right, out=total)
    elif left.device.type == "cuda":
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(left, right))


def write_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, product: Product) -> None:
    """Overwrite `total` with product(left, right), as `add_product` adds it."""
    if product is torch.mm and left.dtype == total.dtype:
        torch.mm(left, right, out=total)
    elif product is torch.mm and left.device.type == "cuda":
        torch.mm(left, right, out_dtype=total.dtype, out=total)
    else:
        total.copy_(product(left, right))
