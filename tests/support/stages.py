"""Builds the stages of tiny models in one process."""

from collections.abc import Iterator
from typing import Any

from transformers import DeepseekV3Config, PreTrainedConfig

from recipes.common.config.placement import coordinates
from recipes.common.parallel.grid import Grid, one_process
from recipes.common.parallel.tiny_model import shrink
from recipes.common.pipeline.stage import Stage, build_stage, plan_model
from recipes.common.recipe import Layout
from tests.support import tiny

FAMILIES = [*tiny.FAMILIES, "deepseek_v3"]


def config_of(family: str, **fields: Any) -> PreTrainedConfig:
    if family == "deepseek_v3":  # multi-head latent attention has widths of its own
        return shrink(DeepseekV3Config(**fields), Layout())
    return tiny.tiny_config(family, **fields)


def stages_of(
    config: PreTrainedConfig, pipeline: int, tensor: int = 1, tensor_rank: int = 0, *, draw: bool = True
) -> Iterator[Stage]:
    """Build every stage of one tensor rank, without process groups."""
    layout = Layout(pipeline=pipeline, tensor=tensor)
    for index in range(pipeline):
        place = coordinates(index * tensor + tensor_rank, pipeline * tensor, layout)
        grid = Grid(**(vars(one_process()) | vars(place)))
        # torch's own products: what is shown is the partition
        planned = plan_model(config, layout, attention="eager")
        yield build_stage(planned, grid, seq_len=16, seed=3, torch_linears=True, draw=draw)
