"""Tells, in the dry run, what is no mistake but may not be what is meant: weights and losses that do nothing, padding, masks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedModel

from recipes.common.checks.tiny_trial import untrained_parameters
from recipes.common.config.ds_config import load_ds_config, precision
from recipes.common.data.blend import data_folders
from recipes.common.data.shards import read_manifest
from recipes.common.recipe import Recipe, from_root

_ROUTER_LOSSES = ("router_aux_loss_coef", "router_z_loss_coef", "aux_loss_coef", "aux_loss_alpha")
_NUMBER_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def run_notes(recipe: Recipe, causal: PreTrainedModel) -> list[str]:
    """Return a line each, for a recipe that `check_recipe` has accepted. causal: its model, on the meta device."""
    notes = [*_loss_notes(causal.config.to_dict()), *_mask_notes(recipe)]
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


def _loss_notes(fields: dict[str, Any]) -> Iterator[str]:
    for name in _ROUTER_LOSSES:
        if fields.get(name):
            yield (
                f"model.{name}={fields[name]} does nothing: no loss of the routers is computed, and nothing balances the "
                "experts; watch their load in the report, and write 0.0 to say so"
            )


def _mask_notes(recipe: Recipe) -> Iterator[str]:
    if not recipe.mask_documents or recipe.attention not in ("sdpa", "eager"):
        return
    element = _NUMBER_BYTES[precision(load_ds_config(recipe.deepspeed))] if recipe.attention == "eager" else 1
    size = recipe.batch.micro_seqs * recipe.batch.seq_len**2 * element
    yield (
        f"mask_documents=True with attention={recipe.attention!r}: a dense mask of {size:,} bytes ({size / 2**30:.2f} GiB) for "
        "each micro batch; attention='flex_attention', or 'flash_attention_2' with batch.micro_seqs=1, makes none"
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
