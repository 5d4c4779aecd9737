"""Leaves parameters alone that no gradient has ever reached, as plain torch does.

ZeRO's flat partitions hold a gradient for every element, zero for those that none reached, and weight decay would move them (the
indexer of DeepSeek-V3.2, whose choices have no gradient). Which ones these are shows in the first backward pass. Once a parameter
has had a gradient, in this process or by what its optimizer state holds, it is trained like any other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from recipes.common.engine import zero_state
from recipes.common.engine.trainer import Trainer
from recipes.common.model.main_grads import MainGrad, main_grad_of


class Untouched(Collection[str]):
    """The Hugging Face names of this stage's parameters without a gradient so far; it puts back what a step does to them."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._names: set[str] = set()
        self._hooks: list[RemovableHandle] = []
        self._main_grads: dict[str, MainGrad] = {}
        # (partition, its part, what that held before the step, whether nothing has reached it)
        self._kept: list[tuple[torch.Tensor, slice, torch.Tensor, torch.Tensor]] = []
        for name, parameter in trainer.stage.hf_named_parameters():
            if parameter.requires_grad:
                self._names.add(name)
                if (main_grad := main_grad_of(parameter)) is not None:
                    self._main_grads[name] = main_grad
                self._hooks.append(parameter.register_post_accumulate_grad_hook(partial(self._reached, name)))
        trainer.optimizer.register_step_pre_hook(self._keep)
        trainer.optimizer.register_step_post_hook(self._put_back)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _reached(self, name: str, parameter: torch.nn.Parameter) -> None:
        self._names.discard(name)

    def _keep(self, optimizer: torch.optim.Optimizer, args: Any, options: Any) -> None:
        """Copy the untouched parts of the partitions that are about to be updated."""
        self._names -= {name for name, main_grad in self._main_grads.items() if main_grad.reached}
        if not self._names:  # the rest of the run needs none of this
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()
            return
        updated = {id(flat) for group in optimizer.param_groups for flat in group["params"] if flat.grad is not None}
        for flat, fragments in zero_state.locate(self._trainer):
            for part in fragments if id(flat) in updated else ():
                if part.name in self._names:
                    place = slice(part.offset, part.offset + part.stop - part.start)
                    self._kept.append((flat, place, flat.detach()[place].clone(), _never(flat, place, optimizer.state[flat])))

    def _put_back(self, optimizer: torch.optim.Optimizer, args: Any, options: Any) -> None:
        for flat, place, before, never in self._kept:
            flat.data[place] = torch.where(never, before, flat.data[place])
        self._kept.clear()


def _never(flat: torch.Tensor, place: slice, state: dict[str, Any]) -> torch.Tensor:
    """Return whether nothing has reached this part on any data rank, now or before, bool [], without waiting for the device."""
    moments = [value for value in state.values() if torch.is_tensor(value) and value.shape == flat.shape]
    return torch.stack([each.detach()[place].count_nonzero() for each in (flat.grad, *moments)]).sum() == 0
