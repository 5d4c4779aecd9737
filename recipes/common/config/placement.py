"""Computes, from a layout alone, which coordinates a rank has and which chunks of layers it runs."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.common.recipe import Layout

ONE_PASS, ZERO_BUBBLE, FOLDED = "1f1b", "zero_bubble", "zero_bubble_v"  # ONE_PASS: a backward pass computes everything


@dataclass(frozen=True)
class Placement:
    """Which pipeline rank runs which chunks of layers.

    Every rank has `per_rank` chunks, of p x per_rank in the model's order. They go around the ranks again and again, chunk c on
    rank c % p; or, folded, there and back: the first rank has the first layers and the last ones.
    """

    schedule: str
    pipeline: int
    per_rank: int = 1

    @property
    def folded(self) -> bool:
        return self.schedule == FOLDED

    @property
    def count(self) -> int:
        """Return how many chunks the model has."""
        return self.pipeline * self.per_rank

    @property
    def words(self) -> str:
        """Return the fields of a Layout that say so, without the pipeline's size."""
        chunks = f", chunks={self.per_rank}" if self.per_rank > 1 and not self.folded else ""
        return f"pipeline_schedule={self.schedule!r}{chunks}"

    def rank_of(self, chunk: int) -> int:
        """Return the pipeline rank that runs a chunk."""
        lap, place = divmod(chunk, self.pipeline)
        return self.pipeline - 1 - place if self.folded and lap else place

    def chunks_of(self, rank: int) -> tuple[int, ...]:
        """Return the chunks that a pipeline rank runs, in the model's order."""
        return tuple(chunk for chunk in range(self.count) if self.rank_of(chunk) == rank)

    def neighbours_of(self, rank: int) -> tuple[int, ...]:
        """Return the pipeline ranks that a rank exchanges messages with; first and last are neighbours where chunks go around."""
        beside = (rank + 1, rank - 1)
        if not self.folded and self.per_rank > 1:
            return tuple(dict.fromkeys(other % self.pipeline for other in beside))
        return tuple(other for other in beside if 0 <= other < self.pipeline)


def placement_of(layout: Layout) -> Placement:
    """Return where a layout's chunks are. A folded schedule has two on every rank."""
    per_rank = 2 if layout.pipeline_schedule == FOLDED else layout.chunks
    return Placement(layout.pipeline_schedule, layout.pipeline, per_rank)


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """One rank's position in the grid of tensor, pipeline and data ranks; known before any process group exists."""

    rank: int
    tensor: int
    pipeline: int
    data: int
    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    context: int = 1  # data ranks that share their sequences: neighbours
    expert: int = 1  # data ranks that share experts: neighbours
    chunks: int = 1  # of layers, that this rank runs one after another
    folded: bool = False  # the pipeline turns back at its last rank and ends on its first

    @property
    def readers(self) -> int:
        """Return how many groups of data ranks read different sequences."""
        return self.data // self.context

    @property
    def reader(self) -> int:
        """Return which of those groups this rank is in."""
        return self.data_rank // self.context

    @property
    def context_rank(self) -> int:
        """Return which slice of its sequences this rank has."""
        return self.data_rank % self.context

    @property
    def expert_rank(self) -> int:
        """Return which of the experts' parts this rank has."""
        return self.data_rank % self.expert

    @property
    def is_first_stage(self) -> bool:
        """Return whether this rank has the embedding."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Return whether this rank has the head and the loss."""
        return self.pipeline_rank == (0 if self.folded else self.pipeline - 1)


def coordinates(rank: int, world_size: int, layout: Layout) -> Coordinates:
    """Return the coordinates of `rank`."""
    tensor, pipeline = layout.tensor, layout.pipeline
    data = world_size // (tensor * pipeline)
    assert data * tensor * pipeline == world_size and data % layout.context == data % layout.expert == 0, (world_size, layout)
    return Coordinates(
        rank=rank,
        tensor=tensor,
        pipeline=pipeline,
        data=data,
        tensor_rank=rank % tensor,
        pipeline_rank=rank // (tensor * data),
        data_rank=rank // tensor % data,
        context=layout.context,
        expert=layout.expert,
        chunks=placement_of(layout).per_rank,
        folded=placement_of(layout).folded,
    )


def rank_coordinates(grid: Coordinates, rank: int) -> tuple[int, int, int]:
    """Return the (pipeline, data, tensor) rank of any rank of `grid`'s run."""
    return rank // (grid.tensor * grid.data), rank // grid.tensor % grid.data, rank % grid.tensor
