"""Reduces gradients to the data ranks that own them, each bucket as soon as its last gradient of a step is there.

A bucket is a flat tensor in which the gradients of some parameters lie one after another; each rank of its group owns an equal
part (ZeRO's partition). A reduce-scatter sends half of what an all-reduce does, and is under way beside the rest of the backward
passes. The other ranks' parts of the tensor mean nothing afterwards.

A step's first gradient of a weight is written over the last step's, so that nothing zeroes the sums and nothing reads zeros.

All ranks of a group have to start the same reductions in the same order, and their gradients need not come in one. Buckets
therefore start in a fixed order: each when its own gradients and those of all buckets before it are there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from recipes.common.parallel.collectives import UnderWay
from recipes.common.parallel.flat_collectives import start_reduction
from recipes.common.runtime.step_clock import CLOCK, num_bytes


@dataclass(frozen=True, kw_only=True, eq=False)
class Bucket:
    """Gradients that are reduced together."""

    flat: torch.Tensor
    own: torch.Tensor  # this rank's part of it
    group: dist.ProcessGroup
    parameters: tuple[nn.Parameter, ...]
    before: float = 1.0  # factor of the gradients before they are summed
    after: float = 1.0  # and of the sums

    @property
    def padding(self) -> torch.Tensor:
        """Return the end of the flat tensor, which belongs to no parameter."""
        return self.flat[sum(parameter.numel() for parameter in self.parameters) :]

    def gradients(self) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Return each parameter and its gradient, of its shape."""
        start = 0
        for parameter in self.parameters:
            yield parameter, self.flat.narrow(0, start, parameter.numel()).view(parameter.shape)
            start += parameter.numel()


class GradientBuckets:
    """Holds the buckets of a rank and which have started. A step adds gradients, says which are the last, and finishes."""

    def __init__(self, buckets: Sequence[Bucket], late: Collection[nn.Parameter] = ()) -> None:
        """buckets: in the order in which they start, equal on the ranks of a group. late: parameters whose gradients are changed
        after the passes (tied weights): their buckets start in `finish`, after all others."""
        tied = set(late)
        self._buckets = sorted(buckets, key=lambda bucket: not tied.isdisjoint(bucket.parameters))
        self._bucket_of = {parameter: index for index, bucket in enumerate(self._buckets) for parameter in bucket.parameters}
        self._late = tied
        self._part_of = {parameter: part for bucket in self._buckets for parameter, part in bucket.gradients()}
        # whose parts of the flat tensors have another step's gradients; before the first step too, which has to compute as others
        self._unwritten = set(self._bucket_of) - tied
        self._expected: Collection[nn.Parameter] = ()
        self._clean = True
        self.visited: set[nn.Parameter] = set()  # parameters at which autograd has ever been
        self._begin_step()

    def _begin_step(self) -> None:
        self._missing = [set(bucket.parameters) for bucket in self._buckets]
        self._works: list[UnderWay | None] = []

    def expect(self, parameters: Collection[nn.Parameter]) -> None:
        """Say that the next gradient of each of these is its last in this step."""
        self._expected = parameters

    def expect_all(self) -> None:
        self.expect(self._bucket_of)

    def adding(self, parameter: nn.Parameter) -> bool:
        """Say that something is being added to the gradient of `parameter`.

        Returns whether it is the step's first, which is to be written over what is there.
        """
        assert self._bucket_of[parameter] >= len(self._works), "a gradient after the last one: its bucket has been reduced"
        self._clean = False
        if parameter not in self._unwritten:
            return False
        self._unwritten.remove(parameter)
        return True

    def added(self, parameter: nn.Parameter) -> None:
        """Say that a backward pass has added all that it has to the gradient of `parameter`."""
        if parameter in self._expected:
            self._complete(parameter)

    def visit(self, parameter: nn.Parameter) -> None:
        """Say that autograd has been at `parameter` in a backward pass, with a gradient or without: none comes from it later."""
        self.visited.add(parameter)
        self.added(parameter)

    def complete(self, parameters: Collection[nn.Parameter]) -> None:
        """Say that no gradient of these is to come in this step, whether there has been one or not."""
        for parameter in parameters:
            self._complete(parameter)
        self._expected = ()

    def finish(self) -> None:
        """Start what has not been started, and wait for all: afterwards each rank's own parts are the means over all ranks."""
        while len(self._works) < len(self._buckets):
            self._start()
        for bucket, work in zip(self._buckets, self._works, strict=True):
            if work is not None:
                work.result()
            if bucket.after != 1.0:
                bucket.own.mul_(bucket.after)
        self._expected = ()
        self._begin_step()

    def clear(self) -> None:
        """Forget the gradients for the next step. What is not written in it, and padding, will be zero."""
        if not self._clean:
            torch._foreach_zero_([bucket.padding for bucket in self._buckets])
            self._unwritten = set(self._bucket_of)
            self._zero(self._late)
        self._clean = True

    def _zero(self, parameters: Collection[nn.Parameter]) -> None:
        """Zero the gradients of those of these parameters that have none in this step."""
        if unwritten := [parameter for parameter in parameters if parameter in self._unwritten]:
            torch._foreach_zero_([self._part_of[parameter] for parameter in unwritten])
            self._unwritten.difference_update(unwritten)

    def _complete(self, parameter: nn.Parameter) -> None:
        if parameter in self._late or parameter not in self._bucket_of:  # it has no elements
            return
        self._missing[self._bucket_of[parameter]].discard(parameter)
        while len(self._works) < len(self._buckets) and not self._missing[len(self._works)]:
            self._start()

    def _start(self) -> None:
        bucket = self._buckets[len(self._works)]
        self._zero(bucket.parameters)
        if bucket.before != 1.0:
            bucket.flat.mul_(bucket.before)
        work = None
        if dist.get_world_size(bucket.group) > 1:
            work = start_reduction(bucket.flat, bucket.own, bucket.group)
        self._works.append(work)


@torch.no_grad()
def sum_together(parts: Mapping[dist.ProcessGroup, Sequence[torch.Tensor]]) -> None:
    """Sum flat gradients over groups in place, a group's in one message. Its ranks have as many elements, in the same order."""
    for group, own in parts.items():
        together = torch.cat(list(own))
        with CLOCK.collective("all_reduce", num_bytes(together), group):
            dist.all_reduce(together, group=group)
        torch._foreach_copy_(list(own), together.split([part.numel() for part in own]))
