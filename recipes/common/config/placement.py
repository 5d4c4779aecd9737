"""Computes, from a layout alone, which coordinates a rank has and which chunks of layers it runs."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.common.recipe import Layout

ONE_PASS, ZERO_BUBBLE, FOLDED = "1f1b", "zero_bubble", "zero_bubble_v"  # ONE_PASS: a backward pass computes everything


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
        folded=layout.pipeline_schedule == FOLDED,
    )


def rank_coordinates(grid: Coordinates, rank: int) -> tuple[int, int, int]:
    """Return the (pipeline, data, tensor) rank of any rank of `grid`'s run."""
    return rank // (grid.tensor * grid.data), rank // grid.tensor % grid.data, rank % grid.tensor


def chunk_count(schedule: str, pipeline: int) -> int:
    """Return how many chunks a model has: one for each stage, or two."""
    return 2 * pipeline if schedule == FOLDED else pipeline


def rank_of_chunk(schedule: str, pipeline: int, chunk: int) -> int:
    """Return the pipeline rank that runs a chunk."""
    return chunk if chunk < pipeline else chunk_count(schedule, pipeline) - 1 - chunk


def chunks_of_rank(schedule: str, pipeline: int, rank: int) -> tuple[int, ...]:
    """Return the chunks that a pipeline rank runs, in the model's order."""
    return (rank, 2 * pipeline - 1 - rank) if schedule == FOLDED else (rank,)
