"""Builds this rank's trainer: process group, model on the meta device, grid, stage and DeepSpeed's engine, each once."""

from __future__ import annotations

from typing import Any

from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedConfig

from recipes.common.data.blend import data_folders
from recipes.common.data.shards import read_manifest
from recipes.common.engine.startup import start_distributed
from recipes.common.engine.trainer import Trainer
from recipes.common.parallel.first_messages import exchange_first_messages
from recipes.common.parallel.grid import build_grid
from recipes.common.pipeline.stage import build_stage, plan_model
from recipes.common.recipe import Layout, Optimizer, Recipe, from_root


def build_trainer(
    model: PreTrainedConfig,
    layout: Layout,
    optimizer: Optimizer,
    ds_config: dict[str, Any],
    *,
    device_type: str,
    seq_len: int,
    attention: str = "sdpa",
    seed: int = 0,
    z_loss: float = 0.0,
    chunk_tokens: int = 2048,
    document_end: int | None = None,
    torch_linears: bool = False,
) -> Trainer:
    """Build this rank's trainer, in the process group that the launcher's environment describes.

    device_type: "cuda" or "cpu". document_end, torch_linears: see Trainer and build_stage.
    """
    device = start_distributed(device_type)
    planned = plan_model(model, layout, attention=attention)
    grid = build_grid(layout, device, planned.tensor_plan.ranks_per_kv_head, planned.head_ranks)
    exchange_first_messages(grid)
    stage = build_stage(
        planned,
        grid,
        layout,
        seq_len=seq_len,
        seed=seed,
        z_loss=z_loss,
        chunk_tokens=chunk_tokens,
        torch_linears=torch_linears,
    )
    return Trainer(stage, grid, optimizer, ds_config, document_end)


def build_recipe_trainer(recipe: Recipe, layout: Layout, ds_config: dict[str, Any], device_type: str | None = None) -> Trainer:
    """Build this rank's trainer of a recipe. With `mask_documents` the data says which id ends a document.

    device_type: None for the accelerator that DeepSpeed finds.
    """
    document_end = read_manifest(from_root(data_folders(recipe)[0]))["eos_id"] if recipe.mask_documents else None
    return build_trainer(
        recipe.model,
        layout,
        recipe.optimizer,
        ds_config,
        device_type=device_type or get_accelerator().device_name(),
        seq_len=recipe.batch.seq_len,
        attention=recipe.attention,
        seed=recipe.seed,
        z_loss=recipe.z_loss,
        chunk_tokens=recipe.logits_chunk_tokens,
        document_end=document_end,
    )
