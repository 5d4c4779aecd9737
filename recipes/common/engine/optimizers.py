"""Builds a recipe's optimizer from torch's: DeepSpeed's own would be compiled at start, and torch's fused one is as fast."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from recipes.common.engine.deepspeed_groups import name_expert_groups
from recipes.common.pipeline.last_passes import parameters_by_chunk
from recipes.common.pipeline.stage import Stage
from recipes.common.recipe import AdamW, Optimizer

_WORTH = 16  # a message of a 16th of a bucket is long enough to go by itself: 125 MB of DeepSpeed's default
_IN_CACHE = 1 << 17  # elements that are updated at a time: 2 MiB of weights, gradients and moments
_UNIT = 16  # elements: the 64 bytes that torch's kernel for CPUs works on at a time


def parameter_groups(stage: Stage, optimizer: Optimizer, bucket: int | None = None) -> list[dict[str, Any]]:
    """Return decayed groups, then those that are not decayed; each in the model's order.

    Not decayed: parameters of fewer than two dimensions (norms, biases) and, by choice, the embeddings. Where expert ranks divide
    experts, those that this stage has follow: DeepSpeed partitions them over other ranks.
    bucket: end a group, from the last layer on, when it has as many elements, or where a chunk ends: it is reduced when its
    gradients are there. None: one group a kind, so that all ranks have as many: DeepSpeed's norms deadlock when ranks differ
    (#1522), ours do not.
    """
    chunks, _ = parameters_by_chunk(stage)
    embeddings = {f"{stage.stack.embedding}.weight", f"{stage.stack.head}.weight"}
    groups: list[list[torch.nn.Parameter]] = [[], []]
    banks = dict(stage.banks())
    for name, parameter in stage.hf_named_parameters():
        if parameter.requires_grad and name not in banks:
            not_decayed = parameter.ndim < 2 or (name in embeddings and not optimizer.decay_embeddings)
            groups[not_decayed].append(parameter)
    decays = (optimizer.weight_decay, 0.0)
    found: list[dict[str, Any]] = []
    for parameters, decay in zip(groups, decays, strict=True):
        found += [{"params": part, "weight_decay": decay} for part in _cut(parameters, bucket, chunks)]
    if banks:
        options = {"moe": True, "name": name_expert_groups(stage.grid, banks.values())}
        parts = _cut(list(banks.values()), bucket, chunks)
        found += [{"params": part, "weight_decay": optimizer.weight_decay} | options for part in parts]
    return found


def _cut(
    parameters: list[torch.nn.Parameter], bucket: int | None, chunks: Sequence[Collection[torch.nn.Parameter]]
) -> list[list[torch.nn.Parameter]]:
    """Cut a list, from its end, where a part has `bucket` elements or more; or a good part of that, and a chunk ends."""
    chunk_of = {parameter: index for index, chunk in enumerate(chunks) for parameter in chunk}
    parts: list[list[torch.nn.Parameter]] = []
    size, last = 0, None
    for parameter in reversed(parameters):
        here = chunk_of.get(parameter)
        ended = bucket is not None and (size >= bucket or (size >= bucket // _WORTH and here != last))
        if not parts or ended:
            parts.append([])
            size = 0
        parts[-1].append(parameter)
        size, last = size + parameter.numel(), here
    return [part[::-1] for part in reversed(parts)]


def build_optimizer(
    groups: list[dict[str, Any]], optimizer: Optimizer, device: torch.device, *, offload: bool
) -> torch.optim.Optimizer:
    """Build the optimizer of these parameter groups. offload: its states are in host memory."""
    if not isinstance(optimizer, AdamW):
        return torch.optim.SGD(groups, lr=optimizer.lr, momentum=optimizer.momentum)
    kind = torch.optim.AdamW if device.type == "cuda" and not offload else WholeUnitsAdamW
    return kind(groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, fused=True)


class WholeUnitsAdamW(torch.optim.AdamW):
    """Runs torch's fused AdamW for CPUs to bits that do not depend on where in a flat partition an element lies.

    The kernel rounds the last few elements of a tensor, which do not fill a unit, differently from all others. Here they are
    updated in a unit filled up with zeros. What fits into the cache is scaled and updated at a time.
    """

    gradient_factor: torch.Tensor | None = None  # [1]: by what gradients are to be multiplied first, in place

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        flat = [t.view(-1) for t in (parameter.detach(), parameter.grad, state["exp_avg"], state["exp_avg_sq"])]
        whole = flat[0].numel() // _UNIT * _UNIT
        for part in zip(*(t[:whole].split(_IN_CACHE) for t in flat), strict=True):
            self._scale(part[1])
            _fused(part, state["step"], group)
        if whole < flat[0].numel():
            rest = [t[whole:] for t in flat]
            self._scale(rest[1])
            unit = [torch.zeros(_UNIT, dtype=t.dtype) for t in rest]
            for filled, part in zip(unit, rest, strict=True):
                filled[: part.numel()] = part
            _fused(unit, state["step"], group)
            for filled, part in zip(unit, rest, strict=True):
                part.copy_(filled[: part.numel()])

    def _scale(self, gradients: torch.Tensor) -> None:
        if self.gradient_factor is not None:
            gradients.mul_(self.gradient_factor)


def _fused(tensors: Sequence[torch.Tensor], step: torch.Tensor, group: dict[str, Any]) -> None:
    """Update `tensors` in place: weights, gradients and the two moments."""
    weights, gradients, first, second = ([t] for t in tensors)
    if tensors[0].numel():
        torch._fused_adamw_(
            weights, gradients, first, second, [], [step],
            lr=float(group["lr"]), beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=group["weight_decay"],
            eps=group["eps"], amsgrad=False, maximize=False,
        )  # fmt: skip
