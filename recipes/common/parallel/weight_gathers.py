"""Gathers updated weights on the data ranks that do not own them, in the order in which the next forward pass uses them.

Each module waits for its own weights, and until then the gathering goes beside what runs before it. Whoever reads weights in
another way than by running modules has to `wait` first.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from recipes.common.parallel.collectives import UnderWay
from recipes.common.parallel.flat_collectives import start_gather


@dataclass(frozen=True, kw_only=True, eq=False)
class Flat:
    """Weights that are gathered together."""

    whole: torch.Tensor
    own: torch.Tensor  # this rank's part of it
    group: dist.ProcessGroup
    parameters: tuple[nn.Parameter, ...]


class WeightGathers:
    """Holds what is under way."""

    def __init__(self, flats: Sequence[Flat]) -> None:
        """flats: in the order in which they are used, equal on the ranks of a group."""
        self._flats = flats
        self._index = {parameter: index for index, flat in enumerate(flats) for parameter in flat.parameters}
        self._works: dict[int, UnderWay] = {}
        self.beside_next_step = False  # do not wait for what is started: the next step does

    def start(self) -> None:
        """Gather what each rank has in its own part."""
        self.wait()
        for index, flat in enumerate(self._flats):
            if dist.get_world_size(flat.group) > 1:
                self._works[index] = start_gather(flat.whole, flat.own, flat.group)
        if not self.beside_next_step:
            self.wait()

    def wait(self) -> None:
        self.wait_for(range(len(self._flats)))

    def wait_before(self, module: nn.Module, parameters: Collection[nn.Parameter] | None = None) -> None:
        """Let `module` wait, when it runs, for these parameters; None: for all."""
        if parameters is None:
            indices = range(len(self._flats))
        else:
            indices = sorted({self._index[parameter] for parameter in parameters if parameter in self._index})
        if indices:
            module.register_forward_pre_hook(lambda *_: self.wait_for(indices), prepend=True)

    def wait_for(self, indices: Collection[int]) -> None:
        for index in indices if self._works else ():
            if (work := self._works.pop(index, None)) is not None:
                work.result()


def wait_in_stage(
    gathers: WeightGathers, stage: nn.Module, before: Sequence[nn.Module], layers: Sequence[nn.Module], after: Sequence[nn.Module]
) -> None:
    """Let each of a stage's layers wait for its weights, what runs `after` them for all, and the stage itself for all others.

    before: what runs before them; it may share weights with what runs after them.
    """
    for layer in layers:
        gathers.wait_before(layer, list(layer.parameters()))
    for module in after:
        gathers.wait_before(module)
    early = {parameter for module in before for parameter in module.parameters()}
    later = {parameter for module in (*layers, *after) for parameter in module.parameters()} - early
    gathers.wait_before(stage, [parameter for parameter in stage.parameters() if parameter not in later])
