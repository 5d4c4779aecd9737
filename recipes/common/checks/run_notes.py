"""Tells, in the dry run, what is no mistake but may not be what is meant: weights and losses that do nothing, padding, masks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel

from recipes.common.checks.tiny_trial import untrained_parameters
from recipes.common.config.ds_config import load_ds_config, precision
from recipes.common.data.blend import data_folders
from recipes.common.data.shards import read_manifest
from recipes.common.model.decoder import find_stack
from recipes.common.model.routers import GLOBAL_BATCH, MICRO_BATCH, SEQUENCE, plan_routers
from recipes.common.parallel.tensor_parallel import plan_tensor_parallel
from recipes.common.parallel.tensor_plans import whole_matrices
from recipes.common.recipe import WHOLE, Layout, Recipe, from_root

_BALANCING = ("router_aux_loss_coef", "aux_loss_coef", "aux_loss_alpha")
_Z_LOSS = "router_z_loss_coef"
_IN_WORDS = {
    MICRO_BATCH: "transformers' loss of each micro batch",
    GLOBAL_BATCH: "transformers' loss of the global batch",
    SEQUENCE: "DeepSeek's loss of each sequence",
}
_LARGE_SHARE, _MOST_NAMES = 0.01, 6  # of the elements of all matrices of the layers
_NUMBER_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def run_notes(recipe: Recipe, causal: PreTrainedModel) -> list[str]:
    """Return a line each, for a recipe that `check_recipe` has accepted. causal: its model, on the meta device."""
    notes = [*_loss_notes(causal, recipe), *_mask_notes(recipe)]
    manifests = dict(_manifests(recipe))
    ends = {manifest.get("eos_id") for manifest in manifests.values()} | _ids(getattr(causal.config, "eos_token_id", None))
    pad = causal.get_input_embeddings().padding_idx
    if pad is not None and pad in ends:
        notes.append(
            f"model.pad_token_id={pad} is the end token too: transformers starts its embedding at 0 and never trains it; "
            "write pad_token_id=None (sequences are packed, nothing is padded)"
        )
    for name, manifest in manifests.items():
        padding = manifest.get("counts", {}).get("padding_tokens", 0)
        tokens = sum(split["tokens"] for split in manifest["splits"].values())
        if padding:
            notes.append(
                f"data={name}: {padding:,} of {tokens:,} tokens are padding ({100 * padding / tokens:.2g} %), which is trained "
                "on like any other token; prepare without --best-fit to have none"
            )
    if untrained := untrained_parameters(recipe.model, recipe.attention):
        more = f" and {len(untrained) - 1} more like it" if len(untrained) > 1 else ""
        notes.append(f"{untrained[0]}{more} (in a tiny model) get no gradient from the loss, and stay as they are drawn")
    return notes


def _loss_notes(causal: PreTrainedModel, recipe: Recipe) -> Iterator[str]:
    """Name coefficients that weigh nothing: transformers computes a loss of the routers for some families only."""
    fields, asked = causal.config.to_dict(), recipe.router
    plan = plan_routers(causal, find_stack(causal), asked)
    weighed = {_Z_LOSS: bool(plan.z_loss)} | dict.fromkeys(_BALANCING, plan.balances or not plan.routers)
    for name, does_something in weighed.items():
        if fields.get(name) and not does_something:
            cure = f"z_loss={fields[name]}" if name == _Z_LOSS else f"coefficient={fields[name]}"
            chosen = ", loss=..." if name != _Z_LOSS and asked.loss is None else ""
            yield (
                f"model.{name}={fields[name]} does nothing here; router=Router({cure}{chosen}) adds this loss, and writing 0.0 "
                "says that none is meant"
            )


def router_lines(recipe: Recipe, causal: PreTrainedModel) -> list[str]:
    """Say which losses the routers of a mixture get."""
    plan = plan_routers(causal, find_stack(causal), recipe.router)
    if not plan.routers:
        return []
    parts = [f"{plan.coefficient:g} x {_IN_WORDS[plan.loss]}"] if plan.balances else ["no balancing loss"]
    parts += [f"{plan.z_loss:g} x the mean of (log Z)^2"] if plan.z_loss else []
    parts += [f"biases move by {plan.bias_rate:g} a step against the load"] if plan.bias_rate else []
    parts += ["computed in fp32"] if plan.fp32 else []
    return [f"routers     {len(plan.routers)}, {plan.chosen} of {plan.experts} experts a token: {', '.join(parts)}"]


def tensor_lines(causal: PreTrainedModel, layout: Layout) -> list[str]:
    """Say which matrices of the layers every tensor rank holds whole, where they are a part that counts."""
    if layout.tensor == 1:
        return []
    stack = find_stack(causal)
    plan = plan_tensor_parallel(causal, stack, layout.tensor, whole_experts=layout.experts == WHOLE)
    total = sum(p.numel() for p in causal.get_submodule(stack.layers).parameters() if p.ndim > 1)
    shares = {name: count / total for name, count in whole_matrices(causal, stack, plan.shards).items()}
    large = sorted((name for name, share in shares.items() if share >= _LARGE_SHARE), key=shares.get, reverse=True)
    if not large:
        return []
    more = f" and {len(large) - _MOST_NAMES} more" if len(large) > _MOST_NAMES else ""
    return [
        f"tensor      {100 * sum(shares.values()):.0f} % of the layers' matrices are whole on each of the {layout.tensor} tensor "
        f"ranks, which all compute them: {', '.join(large[:_MOST_NAMES])}{more}"
    ]


def _mask_notes(recipe: Recipe) -> Iterator[str]:
    if not recipe.mask_documents or recipe.attention not in ("sdpa", "eager"):
        return
    element = _NUMBER_BYTES[precision(load_ds_config(recipe.deepspeed))] if recipe.attention == "eager" else 1
    size = recipe.batch.micro_seqs * recipe.batch.seq_len**2 * element
    yield (
        f"mask_documents=True with attention={recipe.attention!r}: a dense mask of {size:,} bytes ({size / 2**30:.2f} GiB) for "
        "each micro batch; attention='varlen' makes none, in families that run with 'sdpa'"
    )


def _manifests(recipe: Recipe) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each folder's manifest, of those that are on this machine: a dry run may be on another."""
    for name in data_folders(recipe):
        try:
            yield name, read_manifest(from_root(name))
        except (OSError, ValueError):
            continue


def _ids(value: int | list[int] | None) -> set[int]:
    return set(value) if isinstance(value, list | tuple) else set() if value is None else {value}
