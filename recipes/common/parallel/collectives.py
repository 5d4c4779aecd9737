"""Wraps the collectives of tensor parallelism as autograd functions (arXiv 1909.08053, figure 3; arXiv 2205.05198, figure 5).

Each takes a tensor [..., width], or [micro_seqs, seq_len, width] for the sequence's, and the group; a group of None is one rank,
and every function is then the identity. Plain tensors, not DTensors: ZeRO flattens parameters and could not hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle

from recipes.common.runtime.step_clock import CLOCK, num_bytes

_SUM = "gradient_sum"  # the attribute of a parameter


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return all_reduce(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, group: dist.ProcessGroup, own: bool) -> torch.Tensor:
        total = all_reduce(x, group, own=own)
        if total is x:
            ctx.mark_dirty(x)
        return total

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, group: dist.ProcessGroup, partial: bool) -> torch.Tensor:
        ctx.group, ctx.partial = group, partial
        return _all_gather_last(x, group)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        grad = all_reduce(grad, ctx.group) if ctx.partial else grad
        return _own_part(grad, ctx.group), None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _own_part(x, group)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return _all_gather_last(grad, ctx.group), None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, group: dist.ProcessGroup, partial: bool) -> torch.Tensor:
        ctx.group, ctx.partial = group, partial
        return all_gather_sequence(x, group)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        part = _reduce_scatter_sequence if ctx.partial else _own_sequence
        return part(grad, ctx.group), None, None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, group: dist.ProcessGroup, partial: bool) -> torch.Tensor:
        ctx.group = group
        return _reduce_scatter_sequence(x, group) if partial else _own_sequence(x, group)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return all_gather_sequence(grad, ctx.group), None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _all_to_all(x, group)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return _all_to_all(grad, ctx.group), None


def all_reduce(
    x: torch.Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM, *, own: bool = False
) -> torch.Tensor:
    """Return a reduced copy; `x` itself is left alone (autograd may still hold it).

    own: nobody else holds `x`: the result may take its place.
    """
    if group is None:
        return x
    x = _own_copy(x, own)
    with CLOCK.collective("all_reduce", num_bytes(x), group):
        dist.all_reduce(x, op=op, group=group)
    return x


def _own_copy(x: torch.Tensor, own: bool) -> torch.Tensor:
    return x if own and x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)


def _all_gather_last(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    x = x.contiguous()
    parts = all_gather_rows(x.view(1, *x.shape), group)
    return parts.movedim(0, -2).reshape(*x.shape[:-1], -1)


def _own_part(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return x.chunk(dist.get_world_size(group), dim=-1)[dist.get_rank(group)].contiguous()


def copy_to(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return `x`; its gradient is summed over the group, of which each rank computes a part of what follows."""
    return x if group is None else _Copy.apply(x, group)


def reduce_from(x: torch.Tensor, group: dist.ProcessGroup | None, *, own: bool = False) -> torch.Tensor:
    """Sum over the group; the gradient passes unchanged, since what follows is the same on every rank. own: see `all_reduce`."""
    return x if group is None else _Reduce.apply(x, group, own)


def gather_from(x: torch.Tensor, group: dist.ProcessGroup | None, *, partial: bool = False) -> torch.Tensor:
    """Concatenate the last dimension. `partial`: what follows differs by rank, so its sum is the gradient."""
    return x if group is None else _Gather.apply(x, group, partial)


def split_to(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Take this rank's part of the last dimension; the gradient is gathered."""
    return x if group is None else _Split.apply(x, group)


@dataclass(frozen=True, eq=False)
class GradientSum:
    """How a replicated parameter's gradient is summed over ranks: by a hook in each backward pass, until that is removed."""

    group: dist.ProcessGroup
    hook: RemovableHandle


def sum_gradient(parameter: torch.nn.Parameter, group: dist.ProcessGroup) -> None:
    """Sum a replicated parameter's gradient over ranks that each compute a part of it.

    The hook runs on each backward pass's own gradient, before it is accumulated: on the accumulated one it would count earlier
    micro batches again. Who adds up a step's gradients may sum them once a step instead: see `take_gradient_sums`.
    """
    assert not hasattr(parameter, _SUM), "its gradient would be summed twice"
    setattr(parameter, _SUM, GradientSum(group, parameter.register_hook(lambda grad: all_reduce(grad, group))))


def take_gradient_sums(parameters: Iterable[torch.nn.Parameter]) -> dict[torch.nn.Parameter, dist.ProcessGroup]:
    """Return those whose gradients are to be summed, with their groups. Their backward passes sum nothing from now on."""
    sums = {parameter: getattr(parameter, _SUM) for parameter in parameters if hasattr(parameter, _SUM)}
    for each in sums.values():
        each.hook.remove()
    return {parameter: each.group for parameter, each in sums.items()}


def gather_sequence(x: torch.Tensor, group: dist.ProcessGroup | None, *, partial: bool = False) -> torch.Tensor:
    """Concatenate the parts of the sequence. `partial`: what follows differs by rank, so the gradient is reduce-scattered."""
    return x if group is None else _GatherSequence.apply(x, group, partial)


def scatter_sequence(x: torch.Tensor, group: dist.ProcessGroup | None, *, partial: bool = False) -> torch.Tensor:
    """Take this rank's part of the sequence; the gradient is gathered. `partial`: `x` is one rank's term of a sum."""
    return x if group is None else _ScatterSequence.apply(x, group, partial)


def all_gather_sequence(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Concatenate [micro_seqs, part, width] of all ranks along the sequence; no gradient."""
    return _sequence_of(all_gather_rows(x.contiguous(), group), x.shape)


def _sequence_of(parts: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return parts.view(-1, *shape).transpose(0, 1).reshape(shape[0], -1, shape[2])


def all_gather_rows(part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Concatenate [part, width] of all ranks; no gradient."""
    rows = _room_for_all(part, group)
    with CLOCK.collective("all_gather_into_tensor", num_bytes(rows), group):
        dist.all_gather_into_tensor(rows, part, group=group)
    return rows


def _room_for_all(part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return part.new_empty(dist.get_world_size(group) * len(part), *part.shape[1:])


def _reduce_scatter_sequence(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    parts, own = _parts_of_sequence(x, group)
    with CLOCK.collective("reduce_scatter_tensor", num_bytes(parts), group):
        dist.reduce_scatter_tensor(own, parts, group=group)
    return own


def _parts_of_sequence(x: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the parts of [micro_seqs, seq_len, width] one after another (of one sequence no copy), and room for one of them."""
    size = dist.get_world_size(group)
    parts = x.reshape(x.shape[0], size, -1, x.shape[2]).transpose(0, 1).contiguous()
    own = x.new_empty(parts.shape[1:])
    return parts.view(-1, *own.shape[1:]), own


@dataclass(frozen=True, kw_only=True, eq=False)
class UnderWay:
    """A collective that runs beside the computation. All ranks of its group start it in the same place among all others."""

    op: str
    bytes: int  # of the whole
    group: dist.ProcessGroup
    works: Sequence[dist.Work]
    given: torch.Tensor
    finish: Callable[[torch.Tensor], torch.Tensor] = lambda given: given

    def result(self) -> torch.Tensor:
        """Wait for it: on a GPU the stream does, not the host."""
        with CLOCK.collective(f"{self.op}, awaited", self.bytes, self.group):
            for work in self.works:
                work.wait()
        return self.finish(self.given)


def start_all_reduce(x: torch.Tensor, group: dist.ProcessGroup, *, own: bool = False) -> UnderWay:
    """Start the sum of `x`. own: see `all_reduce`."""
    x = _own_copy(x, own)
    work = dist.all_reduce(x, group=group, async_op=True)
    return UnderWay(op="all_reduce", bytes=num_bytes(x), group=group, works=(work,), given=x)


def start_all_gather_rows(part: torch.Tensor, group: dist.ProcessGroup) -> UnderWay:
    """Start `all_gather_rows`."""
    rows = _room_for_all(part, group)
    work = dist.all_gather_into_tensor(rows, part, group=group, async_op=True)
    return UnderWay(op="all_gather_into_tensor", bytes=num_bytes(rows), group=group, works=(work,), given=rows)


def start_all_gather_sequence(x: torch.Tensor, group: dist.ProcessGroup) -> UnderWay:
    """Start `all_gather_sequence`."""
    under_way = start_all_gather_rows(x.contiguous(), group)
    return replace(under_way, finish=partial(_sequence_of, shape=x.shape))


def start_reduce_scatter_sequence(x: torch.Tensor, group: dist.ProcessGroup) -> UnderWay:
    """Start the sum of one rank's terms `x`, of which each rank gets its part of the sequence."""
    parts, own = _parts_of_sequence(x, group)
    work = dist.reduce_scatter_tensor(own, parts, group=group, async_op=True)
    return UnderWay(op="reduce_scatter_tensor", bytes=num_bytes(parts), group=group, works=(work,), given=own)


def exchange(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Send x[i] to rank i: [ranks, n] -> [ranks, n], of which row i came from rank i. The gradient goes the same way back."""
    return _Exchange.apply(x, group)


def _all_to_all(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    x = x.contiguous()
    received = torch.empty_like(x)
    with CLOCK.collective("all_to_all_single", num_bytes(x), group):
        dist.all_to_all_single(received, x, group=group)
    return received


def _own_sequence(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    # a copy: of one sequence the part would be a view, which keeps the whole until its backward pass
    return x.chunk(dist.get_world_size(group), dim=1)[dist.get_rank(group)].clone(memory_format=torch.contiguous_format)
