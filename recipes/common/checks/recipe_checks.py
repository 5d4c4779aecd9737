"""Checks a recipe whole: everything wrong with it in one error, before any process group exists.

Each line names the field with its value, the constraint, and the cure. Nothing is clamped and nothing falls back.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from importlib.metadata import version
from operator import attrgetter
from typing import Any

from recipes.common.checks.compiler_checks import compiler_problems, fusion_problems
from recipes.common.checks.context_checks import context_option_problems, context_size_problems
from recipes.common.checks.determinism_checks import level_problems, machine_problems
from recipes.common.checks.expert_checks import expert_option_problems, expert_size_problems
from recipes.common.checks.model_checks import model_problems
from recipes.common.checks.precision_checks import fp8_problems, precision_machine_problems, precision_problems
from recipes.common.checks.router_checks import router_value_problems
from recipes.common.config.ds_checks import device_problems, ds_config_problems, fp16_supported, version_problems
from recipes.common.config.ds_config import ds_config_path, load_ds_config
from recipes.common.config.field_types import mistyped_fields, shown
from recipes.common.config.lr_schedules import ramp_problems, schedule_problems
from recipes.common.config.placement import FOLDED, placement_of
from recipes.common.data.batches import recipe_data_problems
from recipes.common.data.blend import blend_problems, folders
from recipes.common.data.document_masking import masking_problem
from recipes.common.recipe import (
    PIPELINE_SCHEDULES,
    RECOMPUTE,
    AdamW,
    Blend,
    Checkpoints,
    Layout,
    Optimizer,
    Reaction,
    Recipe,
    RecipeError,
    from_root,
)

_MOST_SEQS = 2**31 - 1
REACTIONS = ("log", "skip", "rewind")


def check_recipe(
    recipe: Recipe, world_size: int, *, check_machine: bool, flag_problems: Sequence[str] = ()
) -> tuple[Layout, dict[str, Any]]:
    """Return the layout for `world_size` ranks and the ds_config. Raises RecipeError with all problems at once.

    A check is left out where a field that it reads has a wrong type. Without a layout for `world_size`, everything is checked
    that no layout changes.
    check_machine: also check this machine's data, tokenizer and device (off in a dry run).
    flag_problems: problems of the flags or the recipe's file, reported in the same error.
    """
    mistyped = mistyped_fields(recipe)
    problems = [*flag_problems, *version_problems(version("deepspeed"), version("torch"))]
    problems += [line for lines in mistyped.values() for line in lines]

    def sound(*names: str) -> bool:
        return not {*names} & {*mistyped}

    problems += range_problems(recipe, mistyped)
    if sound("optimizer"):
        problems += optimizer_problems(recipe.optimizer)
    measured = sound("schedule", "optimizer", "batch", "steps") and min(recipe.steps, *_batch_sizes(recipe)) >= 1
    if measured and recipe.optimizer.lr >= 0:
        problems += schedule_problems(recipe)
    ds_config = None
    if sound("deepspeed"):
        try:
            ds_config = load_ds_config(recipe.deepspeed)
        except RecipeError as error:
            problems += error.problems
    layout = recipe.layouts.get(world_size) if sound("layouts") else Layout()
    if layout is None:
        problems.append(
            f"layouts has no entry for {world_size} GPUs, only for {list(recipe.layouts)}; add "
            f"{world_size}: Layout(tensor=..., pipeline=...) to the recipe"
        )
        layout = Layout()  # it changes nothing of the model, and divides every batch
        if sound("batch", "steps") and min(_batch_sizes(recipe)) >= 1:
            problems += layout_problems(recipe, layout, 1)
    elif sound("layouts", "batch", "steps"):
        problems += layout_problems(recipe, layout, world_size)
    if ds_config is not None:
        problems += ds_config_problems(ds_config, ds_config_path(recipe.deepspeed), layout)
    if sound("model", "num_params", "batch", "attention", "mask_documents", "router"):
        problems += model_problems(recipe, layout)
    if sound("determinism", "layouts", "model"):
        problems += level_problems(recipe, layout, world_size, ds_config)
    if sound("kernels", "determinism"):
        problems += fusion_problems(recipe)
    if sound("precision"):
        problems += precision_problems(recipe, ds_config)
    if not problems:
        problems += fp8_problems(recipe, layout)
    if check_machine:
        problems += precision_machine_problems(recipe)
        problems += _machine_problems(recipe, ds_config, mistyped) + compiler_problems(recipe)
        if sound("determinism", "attention", "model"):
            problems += machine_problems(recipe, world_size, ds_config)
    if problems:
        raise RecipeError(f"recipe {shown(recipe.name)} on {world_size} GPUs", list(dict.fromkeys(problems)))
    return layout, ds_config


def _batch_sizes(recipe: Recipe) -> tuple[int, ...]:
    return recipe.batch.seq_len, recipe.batch.micro_seqs, recipe.batch.global_seqs


def layout_problems(recipe: Recipe, layout: Layout, world_size: int) -> list[str]:
    """Check a layout on `world_size` ranks, and the batch there, by arithmetic alone."""
    names = ("tensor", "pipeline", "context", "expert", "recompute_every", "chunks")
    problems = [
        f"layouts[{world_size}].{name}={getattr(layout, name)} must be a whole number from 1"
        for name in names
        if getattr(layout, name) < 1
    ]
    if not problems:
        problems += option_problems(layout, recipe.batch.seq_len, f"layouts[{world_size}].")
    if problems or recipe.batch.micro_seqs < 1:
        return problems
    replica = layout.tensor * layout.pipeline
    if world_size < 1:
        return [f"layouts[{world_size}]: a layout is for 1 GPU or more; correct the number, or take the layout out"]
    if world_size % replica:
        return [
            f"layouts[{world_size}]: tensor={layout.tensor} x pipeline={layout.pipeline} = {replica} does not divide "
            f"{world_size} GPUs; change the layout or the number of GPUs"
        ]
    data = world_size // replica
    uneven = context_size_problems(layout, data, f"layouts[{world_size}].")
    uneven += expert_size_problems(layout, data, f"layouts[{world_size}].")
    if uneven:
        return problems + uneven
    readers = data // layout.context
    unit = recipe.batch.micro_seqs * readers
    if recipe.batch.global_seqs % unit:
        shared = f" in groups of context={layout.context}" if layout.context > 1 else ""
        problems.append(
            f"batch.global_seqs={recipe.batch.global_seqs} is not a multiple of micro_seqs={recipe.batch.micro_seqs} x {readers} "
            f"data ranks{shared} = {unit}; use a multiple of {unit}, a smaller micro_seqs, or a layout with fewer data ranks"
        )
    return problems + ramp_problems(recipe, readers)


def option_problems(layout: Layout, seq_len: int, prefix: str = "") -> list[str]:
    """Check the options of a layout whose sizes are at least 1: each exists, and has the pipeline or tensor ranks it needs."""
    problems = []
    if layout.pipeline_schedule not in PIPELINE_SCHEDULES:
        problems.append(
            f"{prefix}pipeline_schedule={layout.pipeline_schedule!r} must be one of {', '.join(map(repr, PIPELINE_SCHEDULES))}"
        )
    elif layout.pipeline_schedule != PIPELINE_SCHEDULES[0] and layout.pipeline == 1:
        problems.append(
            f"{prefix}pipeline_schedule={layout.pipeline_schedule!r} with pipeline=1: there is no pipeline to schedule; "
            "leave it out, or use pipeline=2 or more"
        )
    elif layout.chunks > 1 and layout.pipeline == 1:
        problems.append(f"{prefix}chunks={layout.chunks} with pipeline=1: there are no rounds of a pipeline; leave it out")
    elif layout.chunks > 1 and layout.pipeline_schedule == FOLDED:
        problems.append(
            f"{prefix}chunks={layout.chunks} with pipeline_schedule={FOLDED!r}: it has two chunks on every stage; leave chunks "
            "out, or use pipeline_schedule='zero_bubble'"
        )
    chunks = placement_of(layout).count
    if layout.layers_per_stage and not (len(layout.layers_per_stage) == chunks and min(layout.layers_per_stage) >= 1):
        problems.append(
            f"{prefix}layers_per_stage={layout.layers_per_stage} must have {chunks} whole numbers from 1, the layers of "
            f"each chunk in the model's order (pipeline={layout.pipeline}, {placement_of(layout).words}); "
            "leave it out to have them balanced"
        )
    if layout.recompute not in RECOMPUTE:
        problems.append(f"{prefix}recompute={layout.recompute!r} must be one of {', '.join(map(repr, RECOMPUTE))}")
    elif layout.recompute == "none" and layout.recompute_every != 1:
        problems.append(
            f"{prefix}recompute_every={layout.recompute_every} with recompute='none': nothing is recomputed; leave it out, "
            "or use recompute='selective' or 'full'"
        )
    if layout.offload_activations and layout.recompute != "full":
        problems.append(
            f"{prefix}offload_activations=True with recompute={layout.recompute!r}: it keeps on the host the inputs of "
            "recomputed layers; use recompute='full', or leave it out"
        )
    problems += _mlp_option_problems(layout, prefix) + expert_option_problems(layout, prefix)
    if layout.sequence_parallel and layout.tensor == 1:
        problems.append(
            f"{prefix}sequence_parallel=True with tensor=1: no tensor ranks could share a sequence; leave it out, or use "
            "tensor=2 or more"
        )
    elif layout.sequence_parallel and seq_len % layout.tensor:
        problems.append(
            f"{prefix}sequence_parallel=True: seq_len={seq_len} is not a multiple of tensor={layout.tensor}; change seq_len, or "
            "use sequence_parallel=False"
        )
    return problems + context_option_problems(layout, seq_len, prefix)


def _mlp_option_problems(layout: Layout, prefix: str) -> list[str]:
    tokens = f"{prefix}mlp_chunk_tokens={layout.mlp_chunk_tokens}"
    if layout.mlp_chunk_tokens < 0:
        return [f"{tokens} must be a whole number from 1, or 0, for all tokens at once"]
    if layout.mlp_chunk_tokens and layout.recompute == "selective":
        return [f"{tokens} with recompute='selective', which keeps the products that it drops; use recompute='full' or 'none'"]
    if layout.mlp_chunk_tokens and layout.sequence_parallel:
        return [f"{tokens} with sequence_parallel=True, whose MLPs scatter a whole sequence; leave one of them out"]
    return []


_LEAST = {  # whole numbers: the smallest value of each
    "steps": 1,
    "batch.seq_len": 1,
    "batch.micro_seqs": 1,
    "batch.global_seqs": 1,
    "logits_chunk_tokens": 1,
    "evaluation.every_steps": 0,
    "evaluation.seqs": 1,
    "checkpoints.every_steps": 0,
    "checkpoints.keep_last": 1,
    "checkpoints.keep_every_steps": 0,
    "monitor.every_steps": 0,
    "monitor.activations_every_steps": 0,
    "monitor.drift_every_steps": 0,
    "monitor.max_nonfinite_steps": 1,
}


def range_problems(recipe: Recipe, mistyped: Collection[str] = ()) -> list[str]:
    """Check the values of a recipe's fields one by one, and the few that depend on another.

    mistyped: the recipe's own fields whose values cannot be judged.
    """

    def sound(*names: str) -> bool:
        return not {*names} & {*mistyped}

    problems = []
    for name, least in _LEAST.items():
        if sound(name.partition(".")[0]) and (value := attrgetter(name)(recipe)) < least:
            problems.append(f"{name}={value} must be a whole number from {least}")
    if sound("batch") and recipe.batch.global_seqs > _MOST_SEQS:
        problems.append(f"batch.global_seqs={recipe.batch.global_seqs} must be at most {_MOST_SEQS}: a step lists its sequences")
    if sound("data", "batch") and isinstance(recipe.data, Blend) and recipe.batch.seq_len >= 1:
        problems += blend_problems(recipe.data, recipe.batch.seq_len)
    if sound("name") and (not recipe.name.strip(". ") or "/" in recipe.name):
        problems.append(f"name={recipe.name!r} must be a file's name, like the recipe's own: it names the run's folder")
    if sound("reaction", "checkpoints"):
        problems += reaction_problems(recipe.reaction, recipe.checkpoints)
    if sound("monitor") and recipe.monitor.on_drift not in ("stop", "log"):
        problems.append(f"monitor.on_drift={recipe.monitor.on_drift!r} must be 'stop' or 'log'")
    if sound("mask_documents", "attention", "batch") and recipe.mask_documents:
        problem = masking_problem(recipe.attention, recipe.batch.micro_seqs)
        problems += [f"mask_documents=True: {problem}"] if problem else []
    if sound("router"):
        problems += router_value_problems(recipe.router)
    for name in ("z_loss", "checkpoints.every_minutes", "checkpoints.last_save_minutes"):
        if sound(name.partition(".")[0]) and (value := attrgetter(name)(recipe)) < 0:
            problems.append(f"{name}={value} must be 0 or more")
    for name in ("tokenizer", "deepspeed", "data"):
        if sound(name):
            problems += _path_problems(name, getattr(recipe, name))
    return problems


def _path_problems(name: str, value: str | Blend) -> list[str]:
    problems = []
    for path in folders(value) if isinstance(value, Blend) else [value]:
        try:
            if not path:
                problems.append(f"{name}='' must be a path; write one")
            from_root(path).exists()
        except (RuntimeError, OSError, ValueError) as error:  # no such user's home; a name longer than a disk's
            problems.append(f"{name}={path!r} is no path: {error}")
    return problems


def reaction_problems(reaction: Reaction, checkpoints: Checkpoints) -> list[str]:
    """Check the reaction alone, and that a rewind finds a checkpoint from before the onset, also after a save past the onset."""
    problems = []
    if reaction.action not in REACTIONS:
        problems.append(f"reaction.action={reaction.action!r} must be one of {', '.join(map(repr, REACTIONS))}")
    if reaction.max_rewinds < 1:
        problems.append(f"reaction.max_rewinds={reaction.max_rewinds} must be a whole number from 1")
    if reaction.lr_steps < 0:
        problems.append(f"reaction.lr_steps={reaction.lr_steps} must be a whole number from 0")
    if not 0 < reaction.lr_factor <= 1:
        problems.append(f"reaction.lr_factor={reaction.lr_factor} must be above 0 and at most 1")
    if problems:
        return problems
    if (reaction.lr_factor < 1) != (reaction.lr_steps > 0):
        problems.append(
            f"reaction.lr_factor={reaction.lr_factor} with lr_steps={reaction.lr_steps}: neither does anything without the "
            "other; give both, or neither"
        )
    if reaction.action != "rewind":
        if reaction.lr_factor < 1:
            problems.append(f"reaction.lr_factor={reaction.lr_factor} has no effect without action='rewind'; remove it")
        return problems
    if not (checkpoints.every_steps or checkpoints.every_minutes):
        problems.append("reaction.action='rewind' needs checkpoints to roll back to; set checkpoints.every_steps")
    if checkpoints.keep_last == 1:
        problems.append(
            "checkpoints.keep_last=1 with reaction.action='rewind': a save after the onset would delete the one before it; keep 2"
        )
    return problems


def optimizer_problems(optimizer: Optimizer) -> list[str]:
    """Check the values of an optimizer's fields."""
    ranges = {"lr": (0.0, float("inf")), "weight_decay": (0.0, float("inf")), "clip": (0.0, float("inf"))}
    problems = []
    if isinstance(optimizer, AdamW):
        ranges["eps"] = (0.0, 1.0)
        if not all(0 <= beta < 1 for beta in optimizer.betas):
            problems.append(f"optimizer.betas={optimizer.betas}: both must lie in [0, 1)")
    else:
        ranges["momentum"] = (0.0, 1.0)
    for name, (least, most) in ranges.items():
        if not least <= getattr(optimizer, name) <= most:
            problems.append(f"optimizer.{name}={getattr(optimizer, name)} must lie between {least} and {most}")
    return problems


def _machine_problems(recipe: Recipe, ds_config: dict[str, Any] | None, mistyped: Collection[str]) -> list[str]:
    """Check the data, the tokenizer and the device of this machine. mistyped: as for `range_problems`."""
    problems = []
    readable = not {"data", "tokenizer", "batch", "model", "evaluation"} & {*mistyped}
    readable = readable and not any(_path_problems(name, getattr(recipe, name)) for name in ("data", "tokenizer"))
    if readable and recipe.batch.seq_len >= 1 and isinstance(recipe.model.get_text_config().vocab_size, int):
        problems += recipe_data_problems(
            recipe.data,
            seq_len=recipe.batch.seq_len,
            vocab_size=recipe.model.get_text_config().vocab_size,
            tokenizer=from_root(recipe.tokenizer),
            needs_validation=recipe.evaluation.every_steps > 0,
            validation_seqs=recipe.evaluation.seqs,
        )
    if ds_config is not None:
        problems += device_problems(ds_config, ds_config_path(recipe.deepspeed), fp16_supported())
    return problems
