"""Finds what would break a recipe's level of determinism: its layout or model, the environment, a kernel that it uses."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedConfig

from recipes.common.config.determinism_levels import BITWISE, BITWISE_STAGES, ROUNDING, environment_problems, promises
from recipes.common.config.ds_config import precision
from recipes.common.parallel.grid import one_process
from recipes.common.parallel.tiny_model import shrink
from recipes.common.pipeline.stage import build_stage, plan_model
from recipes.common.recipe import DETERMINISM, Layout, Recipe

_SEQS, _SEQ_LEN = 2, 16
_QUANTIZED = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")
_NO_ORDER = re.compile(r"(\S+) does not have a deterministic implementation")  # torch's own words


def level_problems(recipe: Recipe, layout: Layout, world_size: int, ds_config: Mapping[str, Any] | None) -> list[str]:
    """Return what in the recipe itself breaks the level that it asks for."""
    level = recipe.determinism
    if level not in DETERMINISM:
        return [f"determinism={level!r} must be one of {', '.join(map(repr, DETERMINISM))}"]
    found = []
    if promises(level, ROUNDING) and ds_config is not None:
        zero = ds_config.get("zero_optimization")
        found += [
            f"zero_optimization.{key}=true sends rounded values; delete it"
            for key in _QUANTIZED
            if isinstance(zero, dict) and zero.get(key)
        ]
    if promises(level, BITWISE_STAGES):
        found += _stage_problems(recipe, layout, world_size)
    return [f"determinism={level!r}: {text}" for text in found]


def machine_problems(recipe: Recipe, world_size: int, ds_config: Mapping[str, Any] | None) -> list[str]:
    """Return what on this machine, in its environment or of its kernels, breaks the level."""
    level = recipe.determinism
    if level not in DETERMINISM or not promises(level, ROUNDING):
        return []
    gpu = get_accelerator().device_name() == "cuda"
    problems = environment_problems(level, os.environ, gpu=gpu, ranks=world_size, attention=recipe.attention)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
    return problems or kernel_problems(recipe, device, ds_config)


def kernel_problems(recipe: Recipe, device: torch.device, ds_config: Mapping[str, Any] | None) -> list[str]:
    """Return the kernel that a small model of the recipe uses on this device and that has no fixed order, by name."""
    if not promises(recipe.determinism, BITWISE):
        return []
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision(dict(ds_config or {})), torch.float32)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with torch.random.fork_rng(devices=[]):
            _train_a_step(recipe.model, recipe.attention, device, dtype)
    except RuntimeError as error:
        if match := _NO_ORDER.search(str(error)):
            return [
                f"determinism={recipe.determinism!r}: {match[1]} has no order of its own on this device, and "
                f"model={type(recipe.model).__name__} uses it; lower determinism, or use another attention or family"
            ]
    except Exception:  # whatever a family's code raises: tiny_trial tells that
        return []
    finally:
        torch.use_deterministic_algorithms(before)
    return []


def _train_a_step(config: PreTrainedConfig, attention: str, device: torch.device, dtype: torch.dtype) -> None:
    planned = plan_model(shrink(config, Layout()), attention=attention)
    stage = build_stage(planned, one_process(device), seq_len=_SEQ_LEN).to(dtype)
    first = 3 if stage.vocab_size > 8 else 0
    ids = torch.arange(_SEQS * _SEQ_LEN, device=device).view(_SEQS, _SEQ_LEN) % (stage.vocab_size - first) + first
    stage.train()(ids, labels=(ids.roll(-1, dims=1), torch.tensor(1.0 / ids.numel(), device=device))).backward()


def _stage_problems(recipe: Recipe, layout: Layout, world_size: int) -> Iterator[str]:
    """Yield what would be summed, or drawn, in another order with other stages."""
    data = world_size // (layout.tensor * layout.pipeline)
    if data > 2:
        yield (
            f"{data} data ranks: the place of a weight decides in which order more than two are summed, and stages move weights; "
            "use a layout with two data ranks at most, or determinism='bitwise'"
        )
    if layout.context > 1:
        yield f"context={layout.context}: equal bits in other stages were not shown for it; use determinism='bitwise'"
    if layout.expert > 1:
        yield f"expert={layout.expert}: equal bits in other stages were not shown for it; use determinism='bitwise'"
    fields = recipe.model.to_dict()
    if recipe.model.get_text_config().tie_word_embeddings:
        yield (
            "model.tie_word_embeddings=True: first and last stage add up the gradient of the shared weight in another order "
            "than one stage; untie it, or use determinism='bitwise'"
        )
    for name, value in fields.items():
        if name.endswith(("dropout", "pdrop")) and isinstance(value, int | float) and value > 0:
            yield f"model.{name}={value}: each stage draws its own dropout; set it to 0, or use determinism='bitwise'"
