"""Checks what `kernels` asks for: its value, whether this machine can compile, and what is fused of a model."""

from __future__ import annotations

import copy
import importlib.util
import shutil
from collections.abc import Sequence

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from recipes.common.config.determinism_levels import BITWISE, promises
from recipes.common.model.fusion import ACTIVATIONS, NORMS, ROTATION, fuse_layer
from recipes.common.recipe import DETERMINISM, KERNELS, Recipe

_C_COMPILERS = ("cc", "gcc", "clang")
_CXX_COMPILERS = ("g++", "clang++")


def fusion_problems(recipe: Recipe) -> list[str]:
    """Return what in the recipe itself is wrong with its `kernels`."""
    if recipe.kernels not in KERNELS:
        return [f"kernels={recipe.kernels!r} must be one of {', '.join(map(repr, KERNELS))}"]
    if recipe.kernels == "compile" and recipe.determinism in DETERMINISM and promises(recipe.determinism, BITWISE):
        return [
            f"kernels='compile' with determinism={recipe.determinism!r}: on a GPU the compiler chooses how a sum is split by "
            "timing it, anew in each run; use kernels='none', or determinism='rounding'"
        ]
    return []


def compiler_problems(recipe: Recipe) -> list[str]:
    """Return what this machine lacks to compile kernels."""
    if recipe.kernels != "compile":
        return []
    if get_accelerator().device_name() == "cuda":
        found = [] if importlib.util.find_spec("triton") else ["torch compiles for GPUs by triton: pip install triton"]
        return [f"kernels='compile': {line}, or use kernels='none'" for line in found + _missing("a C compiler", _C_COMPILERS)]
    return [f"kernels='compile': {line}, or use kernels='none'" for line in _missing("a C++ compiler", _CXX_COMPILERS)]


def _missing(what: str, commands: Sequence[str]) -> list[str]:
    if any(map(shutil.which, commands)):
        return []
    return [f"{what} is needed, and none of {', '.join(commands)} is found; install one"]


def fusion_lines(recipe: Recipe, layers: nn.ModuleList) -> list[str]:
    """Return a line on what is compiled, by layers on the meta device: none without `kernels`."""
    if recipe.kernels != "compile":
        return []
    known: dict[str, frozenset[str]] = {}
    by_layer = []
    for layer in layers:  # a hundred, of a kind or two
        alike = _likeness(layer)
        if alike not in known:
            known[alike] = fuse_layer(copy.deepcopy(layer))
        by_layer.append(known[alike])
    counts = {kind: sum(kind in kinds for kinds in by_layer) for kind in (NORMS, ROTATION, ACTIVATIONS)}
    parts = [f"{kind} in {count} of {len(layers)} layers" for kind, count in counts.items()]
    return [f"compiled by torch {torch.__version__}: {', '.join(parts)}; the loss"]


def _likeness(layer: nn.Module) -> str:
    """Return what is equal for layers that fuse alike: classes, plain attributes and shapes, but not a layer's number."""
    plain = bool | int | float | str | tuple
    told = []
    for name, module in layer.named_modules():
        attributes = {field: value for field, value in vars(module).items() if isinstance(value, plain) and field != "layer_idx"}
        shapes = [(field, tuple(parameter.shape)) for field, parameter in module.named_parameters(recurse=False)]
        told.append((name, type(module), attributes, shapes))
    return repr(told)
