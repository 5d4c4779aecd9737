"""Ties embedding and head over the stages of a pipeline: one weight with one gradient.

On two ranks, each has a copy and the gradients are summed between them. On a folded pipeline one rank has both, which share the
weight itself; the head's gradient is kept apart until the step's end, so that sums are made in the same order.
"""

from __future__ import annotations

import torch

from recipes.common.model.main_grads import give_main_grad
from recipes.common.pipeline.stage import Stage


def gradient_of(weight: torch.nn.Parameter) -> torch.Tensor | None:
    """Return the tensor in which DeepSpeed adds up the gradient of `weight`: an fp32 one beside it with ZeRO 1."""
    for name in ("_hp_grad", "grad_accum"):
        if getattr(weight, name, None) is not None:
            return getattr(weight, name)
    return weight.grad


class TiedHead:
    """Keeps the head's gradient apart, on a rank that has embedding and head. Create it after DeepSpeed has moved the weights."""

    def __init__(self, stage: Stage) -> None:
        head = stage.causal.get_submodule(stage.stack.head)
        self.weight = stage.causal.get_submodule(stage.stack.embedding).weight
        # the same memory with a gradient of its own; no parameter of the module, or the weight would be there twice
        self._alias = self.weight.detach().requires_grad_()
        self._sum = torch.zeros_like(self._alias, dtype=torch.float32, requires_grad=False)
        self._alias.register_post_accumulate_grad_hook(self._add)
        del head._parameters["weight"]
        head.weight = self._alias

    def add_in_products(self) -> None:
        """Let the head's products add to its sum, as other weights' do to theirs (see `model.main_grads`)."""
        give_main_grad(self._alias, self._sum, lambda: False)

    def _add(self, alias: torch.Tensor) -> None:
        if alias.grad is not None:
            self._sum.add_(alias.grad)
            alias.grad = None

    def add_gradient(self) -> None:
        """Add the head's gradient to the embedding's, at the end of a step's passes."""
        assert self._alias.data_ptr() == self.weight.data_ptr(), "the engine has moved the embedding"
        gradient_of(self.weight).view(-1).add_(self._sum.view(-1))  # DeepSpeed keeps some of them flat
        self._sum.zero_()
