"""Checks that every rank that holds a copy of a tensor holds the same bits.

    across data ranks      every weight that the model computes with (ZeRO 3 keeps no copies); of experts, where they are the same
    across tensor ranks    what is not sharded (norms, routers, biases of row-parallel layers): its fp32 master weights
    across the pipeline    embeddings that the first and the last stage share

BLOOM trained for weeks with norms that had drifted apart on its tensor ranks, because clipping left some of them out, and
nothing checked. A copy's checksum is 64 bits, made where it lies; a check sends two numbers a parameter and waits twice.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from recipes.common.engine import zero_state
from recipes.common.engine.trainer import Trainer
from recipes.common.parallel.json_messages import gather_json

_CHUNK = 1 << 20
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio, as a signed number
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, kw_only=True)
class Drift:
    """One parameter whose copies differ."""

    name: str  # Hugging Face name
    across: str  # "data", "tensor" or "pipeline" ranks
    ranks: tuple[int, ...]  # global ranks whose copy differs from what most of the group holds; all of them without a majority
    group: tuple[int, ...]  # the global ranks that should agree
    largest: float  # difference of an element over the group

    def __str__(self) -> str:
        odd, group = _list(self.ranks), _list(self.group)
        return f"{self.name} differs across {self.across} ranks: rank {odd} of {group}, by up to {self.largest:.3g}"


Copies = tuple[str, dist.ProcessGroup, dict[str, torch.Tensor]]  # (across, who should agree, name -> this rank's copy)


def find_drift(trainer: Trainer) -> list[Drift]:
    """Return every parameter whose copies differ, on every rank. Collective."""
    copies = _summed_copies(trainer)
    count = torch.zeros((), dtype=torch.int64, device=trainer.grid.device)
    differ = []  # bool [parameters] of each kind of copies
    for _, group, _, sums in copies:
        # the largest of all and, as the largest of the complements, the smallest
        extremes = torch.cat([sums, ~sums])
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
        high, low = extremes.chunk(2)
        differ.append(high != ~low)
        count += differ[-1].sum()
    if dist.get_world_size() > 1:
        dist.all_reduce(count)
    if not count.item():
        return []
    differing: list[tuple[str, dist.ProcessGroup, str, int, float]] = []
    for (across, group, tensors, sums), differs in zip(copies, differ, strict=True):
        for index, name in enumerate(tensors):
            if differs[index]:
                differing.append((across, group, name, int(sums[index]), _largest_difference(tensors[name], group)))
    return _agree(differing, trainer.grid.device)


def _summed_copies(trainer: Trainer) -> list[tuple[str, dist.ProcessGroup, dict[str, torch.Tensor], torch.Tensor]]:
    """Return the copies with their checksums. Collective: raises RuntimeError on every rank where one fails at it."""
    own, error = [], None
    try:
        for across, group, tensors in _copies(trainer):
            own.append((across, group, tensors, torch.stack([checksum(tensor) for tensor in tensors.values()])))
    except Exception as raised:  # the others would wait for this rank's part for ever
        error = raised
    failed = torch.full((1,), float(error is not None), device=trainer.grid.device)
    if dist.get_world_size() > 1:
        dist.all_reduce(failed)
    if failed.item():
        raise RuntimeError(repr(error) if error else "another rank failed, see its output") from error
    return own


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Return int64 [] of the bits and their places, modulo 2^64, on the tensor's device. Any one element changes it."""
    bits = tensor.detach().contiguous().flatten().view(_BITS[tensor.element_size()])
    places = torch.arange(min(_CHUNK, bits.numel()), device=bits.device).mul_(_ODD).bitwise_or_(1)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for part in bits.split(_CHUNK):
        total = total * _ODD + (part.long() * places[: part.numel()]).sum()
    return total


def _copies(trainer: Trainer) -> Iterator[Copies]:
    """Yield what this rank has copies of, with whom. Ranks of one group list the same names in the same order."""
    grid, stage = trainer.grid, trainer.stage
    weights = trainer.hf_shards()
    partitioned = any(hasattr(parameter, "ds_tensor") for parameter in stage.parameters())
    if grid.data_group is not None and not partitioned:
        yield "data", grid.data_group, {name: weight for name, weight in weights.items() if name not in stage.held.banks}
    if grid.expert_data_group is not None and (banks := {n: w for n, w in weights.items() if n in stage.held.banks}):
        yield "data", grid.expert_data_group, banks
    if grid.tensor_group is not None:
        # data ranks own different fragments; tensor ranks of one data rank own the same ones
        own = {
            fragment.name: flat[fragment.offset : fragment.offset + fragment.stop - fragment.start]
            for flat, fragments in zero_state.locate(trainer)
            for fragment in fragments
            if fragment.name not in stage.tensor_plan.shards
        }
        if own:
            yield "tensor", grid.tensor_group, {name: own[name].detach() for name in sorted(own)}
    tied = f"{stage.stack.embedding}.weight"
    if grid.tie_group is not None and stage.stack.tied and (grid.is_first_stage or grid.is_last_stage):
        yield "pipeline", grid.tie_group, {tied: weights[tied]}


def _largest_difference(tensor: torch.Tensor, group: dist.ProcessGroup) -> float:
    values = tensor.detach().float()
    high, low = values.clone(), values.clone()
    dist.all_reduce(high, dist.ReduceOp.MAX, group=group)
    dist.all_reduce(low, dist.ReduceOp.MIN, group=group)
    return float((high - low).abs().max())


def _agree(differing: list[tuple[str, dist.ProcessGroup, str, int, float]], device: torch.device) -> list[Drift]:
    """Gather what differs from all ranks, and name the ranks whose copy is the odd one."""
    mine = [
        (across, dist.get_process_group_ranks(group), name, value, largest) for across, group, name, value, largest in differing
    ]
    sums: dict[tuple[str, tuple[int, ...], str], dict[int, int]] = defaultdict(dict)
    largest_of = {}
    for rank, items in enumerate(gather_json(mine, device)):
        for across, group, name, value, largest in items:
            sums[across, tuple(group), name][rank] = value
            largest_of[across, tuple(group), name] = largest
    drifts = []
    for key, by_rank in sums.items():
        (value, most), *_ = Counter(by_rank.values()).most_common(1)
        odd = [rank for rank, other in by_rank.items() if other != value] if 2 * most > len(by_rank) else list(by_rank)
        across, group, name = key
        drifts.append(Drift(name=name, across=across, ranks=tuple(odd), group=group, largest=largest_of[key]))
    return drifts


def _list(ranks: tuple[int, ...]) -> str:
    return ", ".join(map(str, ranks))
