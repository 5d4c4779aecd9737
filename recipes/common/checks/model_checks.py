"""Checks what only building a recipe's model, on the meta device, can show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from recipes.common.checks.context_checks import context_head_problems, context_trial_problems
from recipes.common.checks.expert_trial import shared_expert_problems
from recipes.common.checks.family_trials import (
    chunk_problems,
    masking_problems,
    partition_problems,
    sequence_problems,
    varlen_problems,
)
from recipes.common.checks.router_checks import router_problems, router_value_problems
from recipes.common.checks.tiny_trial import trial_problems
from recipes.common.config.ds_config import did_you_mean
from recipes.common.config.model_sizes import size_problem
from recipes.common.config.placement import placement_of
from recipes.common.data.document_masking import masking_problem
from recipes.common.model.decoder import PlanError, Stack, find_stack
from recipes.common.model.flops import layer_costs
from recipes.common.model.initial_weights import build_empty
from recipes.common.model.routers import plan_routers
from recipes.common.model.varlen_attention import VARLEN
from recipes.common.parallel.tensor_parallel import plan_tensor_parallel
from recipes.common.parallel.tiny_model import field_of, shallow
from recipes.common.pipeline.crossings import find_crossings
from recipes.common.pipeline.partition import chunks_by_rank, partition_layers
from recipes.common.recipe import Layout, Recipe

_HEAD_DIM = "head_dim"
# transformers' common names; of larger numbers a model is not built in any time
_SIZES = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "max_position_embeddings": 2**40,
}


def model_problems(recipe: Recipe, layout: Layout) -> list[str]:
    """Check the model's fields, its size, and whether it can be sharded and partitioned as the layout says."""
    problems = config_problems(recipe.model)
    if wrong := value_problems(recipe.model):  # the model could not be built, or not in any time
        return problems + wrong
    try:
        causal = build_empty(recipe.model, recipe.attention)
        stack = find_stack(causal)
    except Exception as error:  # a family's own code may raise anything
        return [*problems, _build_problem(recipe, error)]
    if wrong_count := count_problem(recipe, causal):
        problems.append(wrong_count)
    text = recipe.model.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if isinstance(positions, int) and positions and recipe.batch.seq_len > positions:
        problems.append(
            f"batch.seq_len={recipe.batch.seq_len} is longer than model.max_position_embeddings={positions}; lower seq_len or "
            "raise max_position_embeddings"
        )
    problems += rope_problems(text, recipe.batch.seq_len)
    if getattr(text, "output_router_logits", False):
        problems.append(
            "model.output_router_logits=True collects every layer's router logits in one place, which a pipeline does not have; "
            "set it to False: router=Router(...) adds the loss of the routers where they are"
        )
    tried = trial_problems(recipe.model, recipe.attention)
    problems += tried
    if not tried and not router_value_problems(recipe.router):
        try:
            routers = plan_routers(causal, stack, recipe.router)
        except PlanError as error:
            routers = error
        problems += router_problems(recipe.model, recipe.router, routers, recipe.attention)
    if recipe.batch.seq_len < 1 or not _can_be_cut(layout):  # reported by recipe_checks
        return problems
    too_deep = depth_problems(layout, len(causal.get_submodule(stack.layers)))
    problems += too_deep
    if not too_deep:
        try:
            plan_tensor_parallel(causal, stack, layout.tensor)
        except PlanError as error:
            problems.append(f"layout tensor={layout.tensor}: {error}; use a tensor size that fits, or tensor=1")
        else:
            if not tried:
                problems += sequence_problems(recipe.model, layout, recipe.attention)
                problems += chunk_problems(recipe.model, layout, recipe.attention)
                problems += shared_expert_problems(recipe.model, causal, stack, layout, recipe.attention)
            problems += context_head_problems(recipe.model, layout, recipe.attention)
        problems += group_problems(causal, stack, [(layout, _own_layers(recipe, causal, stack, layout))])[0]
    return problems or _family_problems(recipe, layout, causal, stack)


def count_problem(recipe: Recipe, causal: PreTrainedModel) -> str:
    """Return what is wrong with num_params, or ""."""
    count = sum(p.numel() for p in causal.parameters())
    if count == recipe.num_params:
        return ""
    return (
        f"num_params={recipe.num_params:_} but the model has {count:_} parameters; check the model's fields for a wrong "
        "value, or correct num_params"
    )


def _can_be_cut(layout: Layout) -> bool:
    """Return whether a layout's own sizes make sense, whatever the model."""
    sizes = (layout.tensor, layout.pipeline, layout.context, layout.expert, layout.chunks, *layout.layers_per_stage)
    return min(sizes) >= 1 and len(layout.layers_per_stage) in (0, placement_of(layout).count)


def _family_problems(recipe: Recipe, layout: Layout, causal: PreTrainedModel, stack: Stack) -> list[str]:
    """Check on tiny models of a sound recipe that documents, attention, context ranks and stages change no result."""
    problems, masked = [], {"mask_documents": recipe.mask_documents}
    if recipe.mask_documents and masking_problem(recipe.attention, recipe.batch.micro_seqs) is None:
        problems += masking_problems(recipe.model, recipe.attention)
    if not problems:
        problems += varlen_problems(recipe.model, recipe.attention, **masked)
    if not problems:
        problems += context_trial_problems(recipe.model, layout, recipe.attention, **masked)
        problems += partition_problems(recipe.model, layout, recipe.attention) or crossing_problems(recipe, causal, stack, layout)
    return problems


def rope_problems(config: PreTrainedConfig, seq_len: int) -> list[str]:
    """Check that sequences are not longer than what YaRN, by its own fields, stretches the positions to."""
    found = getattr(config, "rope_parameters", None) or {}
    problems = []
    for rope in [found, *found.values()] if isinstance(found, dict) else []:  # a family may have one for each type of layer
        if not isinstance(rope, dict) or rope.get("rope_type") != "yarn":
            continue
        positions, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
        if isinstance(positions, int) and isinstance(factor, int | float) and seq_len > positions * factor:
            problems.append(
                f"batch.seq_len={seq_len} is beyond model.rope_parameters: yarn stretches {positions} positions by {factor}; "
                "lower seq_len, or raise factor"
            )
    return problems


def depth_problems(layout: Layout, depth: int) -> list[str]:
    """Check that the model has a layer for every chunk, and as many layers as `layers_per_stage` says."""
    if layout.pipeline > depth:
        return [f"layout pipeline={layout.pipeline} exceeds the model's {depth} layers; use {depth} stages at most"]
    placement = placement_of(layout)
    if placement.count > depth:
        most = depth // placement.per_rank
        cure = "pipeline_schedule='zero_bubble'" if placement.folded else f"chunks={depth // layout.pipeline}"
        return [
            f"layout pipeline={layout.pipeline} with {placement.words} needs {placement.per_rank} chunks of layers a stage, and "
            f"the model has {depth} layers; use {most} stages at most, or {cure}"
        ]
    if layout.layers_per_stage and sum(layout.layers_per_stage) != depth:
        return [
            f"layout layers_per_stage={layout.layers_per_stage} has {sum(layout.layers_per_stage)} layers and the "
            f"model {depth}; let it sum to {depth}"
        ]
    return []


def group_problems(causal: Any, stack: Stack, layouts: Sequence[tuple[Layout, Sequence[Sequence[int]]]]) -> list[list[str]]:
    """Check that every stage holds both kinds of parameters (decayed or not), or DeepSpeed's step deadlocks (#1522).

    layouts: each with its stages, as the layers that they hold. Returns the problems of each.
    """
    kinds = {p.ndim < 2 for p in causal.parameters()}
    of_layer = [{p.ndim < 2 for p in layer.parameters()} for layer in causal.get_submodule(stack.layers)]
    problems: list[list[str]] = []
    for layout, own_layers in layouts:
        lacking = [own for own in own_layers if set().union(*(of_layer[index] for index in own)) != kinds]
        problems.append([
            f"layout pipeline={layout.pipeline}: layers {own[0]} to {own[-1]} hold only matrices or only vectors, and "
            "DeepSpeed needs both on every stage; use fewer stages"
            for own in lacking[:1]
        ])  # fmt: skip
    return problems


def crossing_problems(recipe: Recipe, causal: Any, stack: Stack, layout: Layout) -> list[str]:
    """Check, at the model's own depth, that what its layers are given reaches them in the layout's stages."""
    try:
        find_crossings(causal, stack, recipe.attention, layer_chunks(recipe, causal, stack, layout))
    except PlanError as error:
        return [f"{error}; use pipeline=1 (ZeRO 1 to 3 and tensor parallelism remain)"]
    return []


def _own_layers(recipe: Recipe, causal: Any, stack: Stack, layout: Layout) -> list[list[int]]:
    chunks = layer_chunks(recipe, causal, stack, layout)
    return [[index for run in runs for index in run] for runs in chunks_by_rank(chunks, placement_of(layout))]


def layer_chunks(recipe: Recipe, causal: Any, stack: Stack, layout: Layout) -> list[range]:
    """Return the layers of every chunk of a layout, in the model's order, as they are partitioned in training."""
    costs, head = layer_costs(causal, stack, recipe.batch.seq_len)
    return partition_layers(costs, head, placement_of(layout), layout.layers_per_stage)


def config_problems(config: PreTrainedConfig) -> list[str]:
    """Find fields that the config class does not know. transformers keeps them silently, and trains the typo's default."""
    known = set(type(config)().to_dict()) | set(PreTrainedConfig().to_dict()) | set(_parameter_names(type(config)))
    known |= set(getattr(type(config), "attribute_map", {}))
    unknown = sorted(set(config.to_dict()) - known)
    if _HEAD_DIM in unknown and _reads_head_dim(config):  # some families do, though their config does not declare it
        unknown.remove(_HEAD_DIM)
    return [
        f"model.{name}={config.to_dict()[name]!r}: {type(config).__name__} has no such field{did_you_mean(name, known)}; "
        "remove it or spell it right"
        for name in unknown
    ]


def _reads_head_dim(config: PreTrainedConfig) -> bool:
    try:
        causal = build_empty(shallow(config))
    except Exception:  # the family's own code; building the whole model says more
        return False
    return any(getattr(module, _HEAD_DIM, None) == config.head_dim for module in causal.modules())


def value_problems(config: PreTrainedConfig) -> list[str]:
    """Check the values of sizes, which transformers takes as they come, and that no number is NaN."""
    problems = []
    for name, most in _SIZES.items():
        value = field_of(config, name)
        if isinstance(value, int) and (isinstance(value, bool) or not 1 <= value <= most):
            own = type(config).attribute_map.get(name, name)
            problems.append(f"model.{own}={value} must be a whole number from 1 to {most:_}; write the model's own")
    counted = size_problem(config.to_dict())
    if counted and not problems:
        problems.append(f"model.{counted}; write the model's own")
    for name, value in config.to_dict().items():
        numbers = value.items() if isinstance(value, dict) else [("", value)]
        for key, number in numbers:
            if isinstance(number, float) and math.isnan(number):
                problems.append(f"model.{name}{f'[{key!r}]' if key else ''}=nan must be a number")
        if name.endswith(("dropout", "pdrop")) and isinstance(value, int | float) and not 0 <= value <= 1:
            problems.append(f"model.{name}={value} must lie between 0 and 1")
    return problems


def _build_problem(recipe: Recipe, error: Exception) -> str:
    """Say why the model cannot be built, with the field at fault where it can be told, and the cure."""
    config, kind = recipe.model, type(recipe.model).__name__
    vocab, pad = field_of(config, "vocab_size"), field_of(config, "pad_token_id")
    if isinstance(error, KeyError) and error.args:  # a name that is looked up in a table of transformers
        for name, value in config.to_dict().items():
            if error.args[0] in (value.values() if isinstance(value, dict) else [value]):
                return f"model.{name}={value!r}: {kind} does not know {error.args[0]!r}; write one that it documents"
    if isinstance(error, AssertionError) and isinstance(pad, int) and isinstance(vocab, int) and not -vocab <= pad < vocab:
        return f"model.pad_token_id={pad} is beyond model.vocab_size={vocab}; write pad_token_id=None, or an id of the tokenizer"
    text = " ".join(str(error).split()) or "no further word"
    text = text if isinstance(error, PlanError | ValueError) else f"{type(error).__name__}: {text}"
    beside = "" if recipe.attention in ("sdpa", "eager", VARLEN) else f" (attention={recipe.attention!r})"
    only_text = config.get_text_config()
    cure = "" if only_text is config else f"; use the config of its text model alone, {type(only_text).__name__}(...)"
    return f"model={kind}: {text}{beside}{cure}"


def _parameter_names(config_class: type) -> set[str]:
    return {name for base in config_class.__mro__ for name in getattr(base, "__annotations__", {})}
