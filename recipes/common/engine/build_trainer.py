"""Builds this rank's trainer: process group, model on the meta device, grid, stage and DeepSpeed's engine, each once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedConfig

from recipes.common.config.ds_config import head_sums_at_once
from recipes.common.data.blend import data_folders
from recipes.common.data.shards import read_manifest
from recipes.common.engine.startup import device_is_bound, start_distributed
from recipes.common.engine.trainer import Trainer
from recipes.common.engine.untouched import Untouched
from recipes.common.model.routers import GLOBAL_BATCH, SEQUENCE
from recipes.common.parallel.cross_entropy import last_part_share
from recipes.common.parallel.first_messages import exchange_first_messages
from recipes.common.parallel.grid import build_grid, make_router_group
from recipes.common.pipeline.stage import NO_ROUTER_LOSS, Stage, build_stage, plan_model
from recipes.common.pipeline.streams import GROUP, schedule_problem
from recipes.common.recipe import Layout, Optimizer, Recipe, RecipeError, Router, from_root


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
    kernels: str = "none",
    precision: str | None = None,
    document_end: int | None = None,
    torch_linears: bool = False,
    ramp: Iterable[int] = (),
    draw: bool = True,
    router: Router = NO_ROUTER_LOSS,
) -> Trainer:
    """Build this rank's trainer, in the process group that the launcher's environment describes.

    device_type: "cuda" or "cpu". document_end, torch_linears: see Trainer and build_stage. ramp: other numbers of micro batches
    that steps will have. draw: see build_stage.
    """
    device = start_distributed(device_type)
    planned = plan_model(model, layout, attention=attention, router=router, precision=precision)
    grid = build_grid(layout, device, planned.tensor_plan.ranks_per_kv_head, planned.head_ranks)
    exchange_first_messages(grid)
    shared = {"stages": planned.routers.loss != SEQUENCE, "readers": planned.routers.loss == GLOBAL_BATCH}
    stage = build_stage(
        planned,
        grid,
        layout,
        seq_len=seq_len,
        seed=seed,
        z_loss=z_loss,
        chunk_tokens=chunk_tokens,
        kernels=kernels,
        torch_linears=torch_linears,
        draw=draw,
        router_group=make_router_group(grid, **shared) if planned.routers.balances else None,
        late_head=_late_head(ds_config, layout, seq_len, chunk_tokens),
    )
    if device_is_bound() and layout.pipeline > 1:
        _refuse_deadlocks(stage, {ds_config["gradient_accumulation_steps"], *ramp})
    trainer = Trainer(stage, grid, optimizer, ds_config, document_end)
    trainer.untouched = Untouched(trainer)
    return trainer


def _late_head(ds_config: dict[str, Any], layout: Layout, seq_len: int, chunk_tokens: int) -> float:
    """Return the share of the head's weight gradient that can wait: in a pipeline, where the loss adds to the step's sums."""
    if layout.pipeline == 1 or not head_sums_at_once(ds_config):
        return 0.0
    return last_part_share(ds_config["train_micro_batch_size_per_gpu"] * seq_len // layout.context, chunk_tokens)


def _refuse_deadlocks(stage: Stage, micro_batches: set[int]) -> None:
    """Raise RecipeError for a schedule that cannot run in the process group that somebody else has started."""
    if problem := schedule_problem(stage.placement, micro_batches, stage.pass_costs, GROUP):
        raise RecipeError(
            "this process group cannot run the schedule",
            [
                f"{problem}. The process group was started with a device; start it without device_id, as Trifold does, or use "
                "pipeline_schedule='zero_bubble' with chunks=1, which runs on such streams too"
            ],
        )


def build_recipe_trainer(
    recipe: Recipe, layout: Layout, ds_config: dict[str, Any], device_type: str | None = None, *, draw: bool = True
) -> Trainer:
    """Build this rank's trainer of a recipe. With `mask_documents` the data says which id ends a document.

    device_type: None for the accelerator that DeepSpeed finds. draw: see build_stage.
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
        kernels=recipe.kernels,
        precision=recipe.precision,
        document_end=document_end,
        draw=draw,
        ramp=[seqs * ds_config["gradient_accumulation_steps"] // recipe.batch.global_seqs for _, seqs in recipe.batch.ramp],
        router=recipe.router,
    )
