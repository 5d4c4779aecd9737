"""Building this rank's trainer from a recipe and a layout."""

from __future__ import annotations

from typing import Any

from recipes.common.data.blend import _folders
from recipes.common.data.shards import read_manifest
from recipes.common.engine.startup import start_distributed
from recipes.common.engine.trainer import Trainer
from recipes.common.model.decoder import find_stack
from recipes.common.model.initial_weights import build_empty
from recipes.common.parallel.grid import Grid, build_grid
from recipes.common.parallel.tensor_parallel import plan_tensor_parallel
from recipes.common.pipeline.stage import build_stage
from recipes.common.recipe import Layout, Recipe, from_root


def build(recipe: Recipe, layout: Layout, ds_config: dict[str, Any]) -> tuple[Grid, Trainer]:
    """This rank's place and its trainer, in the process group that the launcher's environment describes."""
    from deepspeed.accelerator import get_accelerator

    device = start_distributed(get_accelerator().device_name())
    causal = build_empty(recipe.model, recipe.attention)
    share = plan_tensor_parallel(causal, find_stack(causal), layout.tensor).ranks_per_kv_head
    grid = build_grid(layout, device, share)
    stage = build_stage(
        recipe.model,
        grid,
        layout,
        seq_len=recipe.batch.seq_len,
        attention=recipe.attention,
        seed=recipe.seed,
        z_loss=recipe.z_loss,
        chunk_tokens=recipe.logits_chunk_tokens,
    )
    document_end = None
    if recipe.mask_documents:
        document_end = read_manifest(from_root(_folders(recipe)[0]))["eos_id"]
    return grid, Trainer(stage, grid, recipe.optimizer, ds_config, document_end)
