"""Says where this rank's weights and optimizer states lie in the whole parameters, and moves weights by rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from recipes.common.engine import zero_state
from recipes.common.engine.trainer import Trainer
from recipes.common.model.initial_weights import name_seed
from tools.replay.fingerprint import mix

COMPUTED = "weight"  # what the model computes with, in its own precision
_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@dataclass(frozen=True)
class StatePart:
    """A part of a parameter, or of one of its optimizer states, on this rank."""

    kind: str  # COMPUTED, or one of zero_state's
    name: str
    values: torch.Tensor  # flat, a view
    index: torch.Tensor  # int64, in the whole flattened parameter; -1 where padded
    place: str  # which part it is: equal for copies of one part on several ranks


def state_parts(trainer: Trainer) -> Iterator[StatePart]:
    """Return this rank's fp32 weights and optimizer states, then the weights that the model computes with (not under ZeRO 3).

    Tied weights are those of the first stage; other copies are given, to be compared.
    """
    for partition in zero_state.partitions(trainer):
        for f in partition.fragments:
            if not _is_tied_copy(trainer, f.name):
                index, place = _index(trainer, f.name, f.start, f.stop)
                for kind, flat in partition.states.items():
                    yield StatePart(kind, f.name, flat[f.offset : f.offset + f.stop - f.start], index, place)
    for name, parameter in trainer.stage.hf_named_parameters():
        if not hasattr(parameter, "ds_tensor"):
            index, place = _index(trainer, name, 0, parameter.numel())
            yield StatePart(COMPUTED, name, parameter.detach().reshape(-1), index, place)


def gradient_parts(trainer: Trainer, flat: torch.Tensor) -> Iterator[StatePart]:
    """Return the gradients in one of the optimizer's flat tensors, as the optimizer was given them."""
    for tensor, fragments in zero_state.locate(trainer):
        if tensor is flat:
            for f in fragments:
                if not _is_tied_copy(trainer, f.name):
                    index, place = _index(trainer, f.name, f.start, f.stop)
                    yield StatePart("gradient", f.name, flat.grad[f.offset : f.offset + f.stop - f.start], index, place)


def _is_tied_copy(trainer: Trainer, name: str) -> bool:
    stage = trainer.stage
    return stage.stack.tied and name == f"{stage.stack.embedding}.weight" and not trainer.grid.is_first_stage


def _index(trainer: Trainer, name: str, start: int, stop: int) -> tuple[torch.Tensor, str]:
    """Return where elements [start, stop) of this rank's flattened shard lie in the whole, and which part of it they are."""
    shape = tuple(trainer.stage.whole_shapes[name])
    held = trainer.stage.held.of(name)
    shard, before = held.shard, held.start(shape)
    start, stop = before + start, before + stop
    flat = torch.arange(start, stop, dtype=torch.int64)
    if shard.spec is None:
        return flat, f"{start}:{stop}"
    local = shard.shape(shape)
    to_whole = torch.full((local[shard.dim],), -1, dtype=torch.int64)
    for here, there, count in shard.ranges(shape):
        to_whole[here : here + count] = torch.arange(there, there + count)
    inner = math.prod(local[shard.dim + 1 :])
    outer, along = flat // (local[shard.dim] * inner), flat // inner % local[shard.dim]
    index = (outer * shape[shard.dim] + to_whole[along]) * inner + flat % inner
    return torch.where(to_whole[along] < 0, -1, index), f"{start}:{stop} of tensor rank {shard.rank}"


@torch.no_grad()
def stir_weights(trainer: Trainer, seed: int) -> None:
    """Move every weight to a neighbouring number of the precision that the model computes in, up or down as `seed` draws.

    Copies of an element move alike. Zeros stay.
    """
    low = next(iter(trainer.stage.parameters())).dtype
    for partition in zero_state.partitions(trainer):
        for f in partition.fragments:
            index, _ = _index(trainer, f.name, f.start, f.stop)
            masters = partition.states[zero_state.MASTER][f.offset : f.offset + f.stop - f.start]
            drawn = mix(index ^ (name_seed(seed, f.name) >> 1)).to(masters.device) & 1
            near = masters.to(low)
            moved = (near.view(_INTEGERS[low]) + (2 * drawn - 1).to(_INTEGERS[low])).view(low)
            masters.add_(torch.where(near == 0, 0.0, moved.float() - near.float()))
    zero_state.publish(trainer)
