"""Finds the whole shape of what every module reads and returns: by running the model, uncut, on tensors without memory.

It runs at two sizes, so that a dimension of sequences or tokens is known by how it grows and no number is taken for another.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from recipes.common.model.document_bounds import no_questions
from recipes.common.model.varlen_attention import built_as

SEQS, PLACES, TOKENS = "sequences", "places", "tokens"  # dimensions that grow: the last is the first two in one
_TRIALS = ((2, 16), (3, 32))  # sequences, their length

Dims = tuple[int | str, ...]


def whole_shapes(config: PreTrainedConfig, attention: str, *, documents: bool = False) -> dict[tuple[str, str], Dims]:
    """Return ("input" or "output", module) -> the dimensions of its first tensor. What the family's code refuses is left out.

    documents: every sequence has positions of its own, as where attention stays inside documents.
    """
    # in bf16, because torch's grouped products of experts have no other type without values
    seen: list[dict[tuple[str, str], tuple[int, ...]]] = []
    with FakeTensorMode(allow_non_fake_inputs=True), no_questions(documents=False), torch.no_grad(), _quiet_torch():
        causal = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=built_as(attention), trust_remote_code=False
        )
        for seqs, length in _TRIALS:
            seen.append({})
            handles = list(_watch(causal, seen[-1]))
            places = {"position_ids": torch.zeros(seqs, length, dtype=torch.int64)} if documents else {}
            try:
                causal(input_ids=torch.zeros(seqs, length, dtype=torch.int64), use_cache=False, **places)
            except Exception:  # whatever a family's code raises where a value is missing: what was seen before it counts
                pass
            finally:
                for handle in handles:
                    handle.remove()
    small, large = seen
    found = {key: _dims(small[key], large[key]) for key in small.keys() & large.keys()}
    return {key: dims for key, dims in found.items() if dims is not None}


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """Silence torch's own word of what a family's code asked for in vain: it is left out, and counted."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _watch(causal: nn.Module, shapes: dict[tuple[str, str], tuple[int, ...]]) -> Iterator[Any]:
    for name, module in causal.named_modules():
        yield module.register_forward_pre_hook(partial(_see_input, shapes, name), with_kwargs=True)
        yield module.register_forward_hook(partial(_see_output, shapes, name))


def _see_input(shapes: dict, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    tensor = input_of(args, kwargs)
    if tensor is not None:
        shapes.setdefault(("input", name), tuple(tensor.shape))


def _see_output(shapes: dict, name: str, module: nn.Module, args: tuple, output: Any) -> None:
    tensor = output_of(output)
    if tensor is not None:
        shapes.setdefault(("output", name), tuple(tensor.shape))


def input_of(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Return the tensor that a module works on: its first argument, or its hidden states."""
    first = args[0] if args else kwargs.get("hidden_states")
    return first if torch.is_tensor(first) else None


def output_of(output: Any) -> torch.Tensor | None:
    """Return the first tensor that a module returns, by itself or in a tuple."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if torch.is_tensor(first) else None


def _dims(small: tuple[int, ...], large: tuple[int, ...]) -> Dims | None:
    if len(small) != len(large):
        return None
    kinds = {(_TRIALS[0][0], _TRIALS[1][0]): SEQS, (_TRIALS[0][1], _TRIALS[1][1]): PLACES}
    kinds[_TRIALS[0][0] * _TRIALS[0][1], _TRIALS[1][0] * _TRIALS[1][1]] = TOKENS
    dims = [a if a == b else kinds.get((a, b)) for a, b in zip(small, large, strict=True)]
    return None if None in dims else tuple(dims)
