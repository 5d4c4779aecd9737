"""Says which passes of a step give parameters their last gradients."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from recipes.common.pipeline.schedules import INPUTS, Pass
from recipes.common.pipeline.schedules import WEIGHTS as WEIGHTS_PASS
from recipes.common.pipeline.stage import Stage

Parameters = frozenset[nn.Parameter]


def parameters_by_chunk(stage: Stage) -> tuple[list[Parameters], Parameters]:
    """Return the parameters of each chunk, with what the model has before its layers and after them, and all others."""
    stack = stage.stack
    modules = [[f"{stack.layers}.{index}." for index in chunk] for chunk in stage.chunks]
    modules[0] += [f"{name}." for name in stack.before]
    modules[-1] += [f"{name}." for name in (*stack.after, stack.head)]
    named = [(name, parameter) for name, parameter in stage.causal.named_parameters() if parameter.requires_grad]
    chunks = [frozenset(p for name, p in named if name.startswith(tuple(prefixes))) for prefixes in modules]
    return chunks, frozenset(parameter for _, parameter in named).difference(*chunks)


def last_passes(order: Sequence[Pass], own: Sequence[int], stage: Stage) -> dict[Pass, Parameters]:
    """Return, for each pass after which some parameters have all gradients of the step, but those that wait in a store, which.

    own: this rank's chunks. Parameters of no chunk have theirs when all chunks have: it is not known which use them.
    """
    chunks, others = parameters_by_chunk(stage)
    found: dict[Pass, Parameters] = {}
    inputs = [step for step in order if step.kind == INPUTS]
    for chunk, parameters in zip(own, chunks, strict=True):
        for kind in (INPUTS, WEIGHTS_PASS):
            if passes := [step for step in order if step.kind == kind and step.chunk == chunk]:
                found[passes[-1]] = parameters
    found[inputs[-1]] |= others
    return found
