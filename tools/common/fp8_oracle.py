"""Gives plain transformers products in fp8 by their definition: factors rounded to fp8, and multiplied in fp32.

They were seen to equal those of torchao 0.18 (Float8Linear, with round_scales_to_power_of_2 and emulate) to the last bit. It is
not used itself: where it is installed, transformers imports it in every process, which takes seconds.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from recipes.common.model.decoder import find_stack
from recipes.common.model.fp8_linears import find_fp8_linears


def multiply_as_defined(model: PreTrainedModel) -> None:
    """Exchange the products of the linears that a run computes in fp8."""
    for name in find_fp8_linears(model, find_stack(model)):
        module = model.get_submodule(name)
        module.forward = partial(fp8_linear, module)


def fp8_linear(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Compute a linear of x [..., in] in fp8."""
    out = _Product.apply(x, module.weight)
    return out if module.bias is None else out + module.bias


def rounded(tensor: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """Return, in fp32, what a kind of fp8 keeps of a tensor that is scaled by a power of two up to the kind's range."""
    most, largest = torch.finfo(kind).max, tensor.abs().max().item()
    scale = 2.0 ** math.floor(math.log2(most / largest)) if largest else 1.0
    return (tensor.float() * scale).clamp(-most, most).to(kind).float() / scale


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return (rounded(x, torch.float8_e4m3fn) @ rounded(weight, torch.float8_e4m3fn).t()).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        x, weight = ctx.saved_tensors
        outputs = rounded(gradient, torch.float8_e5m2)
        of_weight = outputs.flatten(0, -2).t() @ rounded(x, torch.float8_e4m3fn).flatten(0, -2)
        return (outputs @ rounded(weight, torch.float8_e4m3fn)).to(x.dtype), of_weight.to(weight.dtype)
