"""Tied embeddings over the stages of a pipeline: one weight, used by the first layers and by the head, with one gradient.

Where they are on two ranks, each has a copy and the gradients are summed between them. On a folded pipeline they are on one rank
and share the weight itself; the head's gradient is kept apart until the step's end, so that sums are made in the same order.
"""

from __future__ import annotations

import torch

from recipes.common.pipeline.stage import Stage


def gradient_of(weight: torch.nn.Parameter) -> torch.Tensor | None:
    """Where DeepSpeed adds up the gradient of `weight`: under bf16 and fp16 beside it, in fp32."""
    for name in ("_hp_grad", "grad_accum"):
        if getattr(weight, name, None) is not None:
            return getattr(weight, name)
    return weight.grad


class TiedHead:
    """Of a rank that has the embedding and the head. Made once the engine has put the weights where they stay."""

    def __init__(self, stage: Stage) -> None:
        head = stage.causal.get_submodule(stage.stack.head)
        self._weight = stage.causal.get_submodule(stage.stack.embedding).weight
        # the same memory with a gradient of its own; no parameter of the module, or the weight would be there twice
        self._alias = self._weight.detach().requires_grad_()
        self._sum = torch.zeros_like(self._alias, dtype=torch.float32, requires_grad=False)
        self._alias.register_post_accumulate_grad_hook(self._add)
        del head._parameters["weight"]
        head.weight = self._alias

    def _add(self, alias: torch.Tensor) -> None:
        self._sum.add_(alias.grad)
        alias.grad = None

    def give(self) -> None:
        """At the end of a step's passes: add the head's gradient to the embedding's."""
        assert self._alias.data_ptr() == self._weight.data_ptr(), "the engine has moved the embedding"
        gradient_of(self._weight).view(-1).add_(self._sum.view(-1))  # DeepSpeed keeps some of them flat
        self._sum.zero_()
