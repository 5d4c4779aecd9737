"""Describes a run before it starts: the text of --dry-run."""

from __future__ import annotations

import math

from torch import nn

from recipes.common.checks.attention_kernel import attention_lines
from recipes.common.checks.compiler_checks import fusion_lines
from recipes.common.checks.precision_checks import precision_lines
from recipes.common.checks.run_notes import router_lines, run_notes, tensor_lines
from recipes.common.config.lr_schedules import learning_rate_at, seqs_after, tokens_of_run
from recipes.common.config.placement import ONE_PASS, placement_of
from recipes.common.model.decoder import find_stack
from recipes.common.model.flops import layer_costs
from recipes.common.model.initial_weights import build_empty
from recipes.common.model.linears import deferrable_fraction
from recipes.common.parallel.context_parallel import head_ranks
from recipes.common.pipeline.partition import chunks_by_rank, partition_layers
from recipes.common.recipe import WHOLE, Blend, Layout, Reaction, Recipe, Sizes

LARGE_GIB = 1.0  # of masks: worth a line


def describe_run(recipe: Recipe, layout: Layout, sizes: Sizes) -> str:
    """Describe the parameters, layout, batch, schedule and stages of a recipe that `check_recipe` has accepted."""
    causal = build_empty(recipe.model, recipe.attention)
    stack = find_stack(causal)
    costs, head = layer_costs(causal, stack, recipe.batch.seq_len)
    recompute = layout.recompute + (f" every {layout.recompute_every} layers" if layout.recompute_every > 1 else "")
    readers = "data ranks" if sizes.context == 1 else "groups of context ranks"
    lines = [
        f"{recipe.name}: {recipe.num_params:,} parameters ({type(causal).__name__}), {'tied' if stack.tied else 'untied'} head",
        f"layout      {sizes.world} GPUs = tensor {sizes.tensor} x pipeline {sizes.pipeline} x data {sizes.data}"
        f"{_context(recipe, layout)}{_experts(layout)}, "
        f"recompute {recompute}" + _options(layout, causal.get_submodule(stack.layers)),
        f"batch       {recipe.batch.global_seqs} sequences of {recipe.batch.seq_len} = {sizes.tokens_per_step:,} tokens a step: "
        f"{recipe.batch.micro_seqs} a micro batch x {sizes.readers} {readers} x {sizes.accumulation} accumulated",
        f"run         {recipe.steps:,} steps, {tokens_of_run(recipe) / 1e9:,.3f}B tokens, "
        f"{tokens_of_run(recipe) / recipe.num_params:.1f} a parameter",
        f"optimizer   {type(recipe.optimizer).__name__}, {type(recipe.schedule).__name__}: " + _rates(recipe),
        f"files       data {_data(recipe)}, tokenizer {recipe.tokenizer}, DeepSpeed {recipe.deepspeed} as below",
        *(f"attention   {line}" for line in attention_lines(recipe, layout)),
        *(f"kernels     {line}" for line in fusion_lines(recipe, causal.get_submodule(stack.layers))),
        *(f"precision   {line}" for line in precision_lines(recipe, causal)),
        *_masks(recipe, layout),
        *router_lines(recipe, causal),
        *tensor_lines(causal, layout),
        f"on anomaly  {_reaction(recipe.reaction)}",
        *(f"note        {note}" for note in run_notes(recipe, causal)),
        "stage  layers        part of the cost",
    ]
    chunks = partition_layers(costs, head, placement_of(layout), layout.layers_per_stage)
    total = sum(costs) + head
    for index, runs in enumerate(chunks_by_rank(chunks, placement_of(layout))):
        has_head = runs[-1] is chunks[-1]
        cost = sum(costs[i] for run in runs for i in run) + (head if has_head else 0.0)
        parts = ("embedding, " if index == 0 else "") + ", ".join(f"{run[0]}-{run[-1]}" for run in runs)
        lines.append(f"{index:<6} {parts + (', head' if has_head else ''):<24} {100 * cost / total:5.1f} %")
    return "\n".join(lines)


def _context(recipe: Recipe, layout: Layout) -> str:
    if layout.context == 1:
        return ""
    heads = head_ranks(recipe.model, layout)
    how = "by heads" if heads == layout.context else f"{heads} by heads x {layout.context // heads} by queries"
    return f" ({layout.context} context ranks share a sequence, {how})"


def _experts(layout: Layout) -> str:
    said = [f"{layout.expert} data ranks share experts"] if layout.expert > 1 else []
    said += ["tensor ranks have whole experts"] if layout.experts == WHOLE else []
    return f" ({', '.join(said)})" if said else ""


def _masks(recipe: Recipe, layout: Layout) -> list[str]:
    """Say what masks attention holds, where they are large."""
    config, seq_len = recipe.model.get_text_config(), recipe.batch.seq_len
    window = getattr(config, "sliding_window", None) or seq_len
    spans = layout.context // head_ranks(recipe.model, layout)
    kinds = len(set(getattr(config, "layer_types", None) or ["full_attention"]))
    if recipe.attention == "sdpa":
        plain = not recipe.mask_documents and spans == 1
        kinds -= plain and (window >= seq_len or kinds > 1)  # causal attention of a whole sequence needs none
    elif recipe.attention != "eager":
        return []
    shape = recipe.batch.micro_seqs, seq_len // spans, seq_len
    gib = kinds * math.prod(shape) * (1 if recipe.attention == "sdpa" else 4) / 2**30
    if gib < LARGE_GIB:
        return []
    return [
        f"masks       attention={recipe.attention!r} holds {kinds} of {' x '.join(map(str, shape))} elements, {gib:.1f} GiB on "
        "each rank; 'varlen' holds none"
    ]


def _options(layout: Layout, layers: nn.Module) -> str:
    text = ", sequence parallel" if layout.sequence_parallel else ""
    text += f", {layout.chunks} chunks a stage" if layout.chunks > 1 else ""
    if layout.pipeline_schedule != ONE_PASS:
        percent = 100 * deferrable_fraction(layers)
        text += f", {layout.pipeline_schedule} (weight gradients of {percent:.0f} % of the layers' parameters fill the bubble)"
    return text


def _rates(recipe: Recipe) -> str:
    steps = sorted({1, max(recipe.steps // 100, 1), max(recipe.steps // 2, 1), recipe.steps})
    tokens = {step: seqs_after(recipe.batch, step) * recipe.batch.seq_len for step in steps}
    return ", ".join(f"lr {learning_rate_at(recipe, step, tokens[step]):.2e} at step {step:,}" for step in steps)


def _reaction(reaction: Reaction) -> str:
    if reaction.action != "rewind":
        skips = "skip steps with an abnormal gradient norm; " if reaction.action == "skip" else ""
        return skips + "log it, with a black box"
    rate = f", with the learning rate x {reaction.lr_factor:g} for {reaction.lr_steps:,} steps" if reaction.lr_steps else ""
    return f"rewind to a checkpoint before it and skip its sequences{rate}; {reaction.max_rewinds} tries, then stop"


def _data(recipe: Recipe) -> str:
    if not isinstance(recipe.data, Blend):
        return recipe.data
    total = sum(recipe.data.weights.values())
    shares = " + ".join(f"{100 * weight / total:g} % {folder}" for folder, weight in recipe.data.weights.items())
    return shares + "".join(f", other weights after {tokens:,} tokens" for tokens, _ in recipe.data.changes)
