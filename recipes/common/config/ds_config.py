"""Reads `ds_configs/*.json`, and makes the dict that DeepSpeed gets.

A ds_config owns memory, communication and precision; the recipe owns what changes the trained model, and the layout.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recipes.common.config.json_files import unique_keys
from recipes.common.recipe import ROOT, Recipe, RecipeError, Sizes, from_root

NEVER_PRINT = 1_000_000_000  # steps_per_print: None still prints at some places in DeepSpeed


def ds_config_path(name_or_path: str) -> str:
    """Return a ds_config's path for messages: relative to the repository root if it lies inside."""
    path = _locate(name_or_path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def load_ds_config(name_or_path: str) -> dict[str, Any]:
    """Read a file in ds_configs/ by its name, or any path (relative ones start at the repository root).

    Raises RecipeError for a missing file, bad JSON, a key given twice, and numbers that JSON does not have (NaN).
    """
    path = _locate(name_or_path)
    shown = ds_config_path(name_or_path)
    if not path.is_file():
        names = sorted(file.name for file in (ROOT / "ds_configs").glob("*.json"))
        raise RecipeError(
            f"deepspeed={name_or_path!r}",
            [f"deepspeed={name_or_path!r}: there is no {shown}{did_you_mean(path.name, names)}; ds_configs has {names}"],
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise RecipeError(f"deepspeed={name_or_path!r}", [f"{shown}: not plain JSON: {error}"]) from None
    if not isinstance(config, dict):
        raise RecipeError(f"deepspeed={name_or_path!r}", [f"{shown}: must be a JSON object, is {json_text(config)}"])
    return config


def precision(config: dict[str, Any]) -> str:
    """Return "fp32", "bf16" or "fp16": the type of the parameters in forward and backward (master weights are fp32)."""
    for name in ("bf16", "fp16"):
        block = config.get(name)
        if isinstance(block, dict) and block.get("enabled") is True:
            return name
    return "fp32"


def zero_stage(config: dict[str, Any]) -> int:
    """Return the ZeRO stage, 0 if none is given (as in DeepSpeed)."""
    block = config.get("zero_optimization")
    stage = block.get("stage", 0) if isinstance(block, dict) else 0
    return stage if type(stage) is int else 0


def sums_gradients_by_step(config: dict[str, Any]) -> bool:
    """Return whether each weight has one fp32 sum of a step's gradients, to which products add (`engine.gradient_path`)."""
    return zero_stage(config) == 1 and "offload_optimizer" not in config["zero_optimization"]


def head_sums_at_once(config: dict[str, Any]) -> bool:
    """Return whether the head's gradient is added to the step's sum in its products, a chunk of tokens at a time."""
    return sums_gradients_by_step(config) and precision(config) != "fp16"


def merge_ds_config(config: dict[str, Any], recipe: Recipe, sizes: Sizes, accumulation: int) -> dict[str, Any]:
    """Return the dict for `deepspeed.initialize`: the file's keys and what follows from the recipe. `config` is not changed.

    accumulation: micro batches of one step: `sizes.accumulation`, or fewer while the batch ramps.
    """
    merged = copy.deepcopy(config)
    micro_seqs = recipe.batch.micro_seqs
    merged["train_micro_batch_size_per_gpu"] = micro_seqs
    merged["gradient_accumulation_steps"] = accumulation
    merged["train_batch_size"] = micro_seqs * accumulation * sizes.data  # context ranks counted: data ranks to it
    merged["gradient_clipping"] = float(recipe.optimizer.clip)  # always written: DeepSpeed's default is 1.0, not off
    merged["steps_per_print"] = NEVER_PRINT
    return merged


def json_text(value: object) -> str:
    """Return a value as JSON for a message, shortened to 60 characters."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


def did_you_mean(key: str, names: Iterable[str]) -> str:
    """Return a hint at the most similar name, or nothing."""
    close = difflib.get_close_matches(key, list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _locate(name_or_path: str) -> Path:
    in_folder = ROOT / "ds_configs" / name_or_path
    return in_folder if Path(name_or_path).name == name_or_path else from_root(name_or_path)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
