"""Puts DeepSpeed's part of a step on the clock (recipes.common.runtime.step_clock): its pipeline instructions, its collectives.

Everything that DeepSpeed sends goes through one object, `deepspeed.comm.comm.cdb`; a `TimedBackend` stands in front of it.
recipes.common.engine.deepspeed_patches puts both in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe import schedule

from recipes.common.runtime.step_clock import CLOCK, OPTIMIZER, Span, num_bytes

# those of a pipeline engine's instructions that run. Reducing gradients is the optimizer's work; the collectives inside are
# counted apart
_TIMED = (schedule.ReduceGrads, schedule.ReduceTiedGrads, schedule.OptimizerStep)
# the argument that holds the whole of what is sent, by name and position
_WHOLE = {
    "all_reduce": ("tensor", 0),
    "reduce": ("tensor", 0),
    "broadcast": ("tensor", 0),
    "all_gather": ("tensor_list", 0),
    "all_gather_into_tensor": ("output_tensor", 0),
    "reduce_scatter_tensor": ("input_tensor", 1),
    "reduce_scatter": ("input_list", 1),
    "all_to_all_single": ("input", 1),
    "all_reduce_coalesced": ("tensors", 0),
    "all_gather_coalesced": ("output_tensors", 0),
}
_GROUP_POSITION = {"all_reduce": 2, "all_reduce_coalesced": 2}  # where DeepSpeed passes the group by position


Instruction = Callable[..., None]  # called as DeepSpeed's engine calls it: with the engine and named arguments


def timed_instructions(instructions: dict[type, Instruction]) -> dict[type, Instruction]:
    """Return those of a pipeline engine's `instructions` that a step's time goes to, with a span around each."""
    return {kind: _timed(CLOCK.span(OPTIMIZER), instructions[kind]) for kind in _TIMED}


def _timed(span: Span, run: Instruction) -> Instruction:
    def timed(engine: DeepSpeedEngine, **arguments: Any) -> None:
        with span:
            run(engine, **arguments)

    return timed


class TimedBackend:
    """Wraps DeepSpeed's communication backend: spans around what sends tensors; all else is the backend's own."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        if name in _WHOLE:
            found = _timed_collective(name, found)
            setattr(self, name, found)  # the next call finds it at once
        return found


class TimedWork:
    """Wraps an asynchronous collective: only waiting for it takes the step's time."""

    def __init__(self, work: Any, span: Span) -> None:
        self._work, self._span = work, span

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)

    def wait(self, *arguments: Any) -> Any:
        with self._span:
            return self._work.wait(*arguments)


def _timed_collective(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    argument, position = _WHOLE[name]
    group_position = _GROUP_POSITION.get(name)

    def timed(*arguments: Any, **named: Any) -> Any:
        whole = named[argument] if argument in named else arguments[position]
        count = num_bytes(whole) if isinstance(whole, torch.Tensor) else sum(num_bytes(each) for each in whole)
        by_position = group_position is not None and len(arguments) > group_position
        group = arguments[group_position] if by_position else named.get("group")
        is_async = arguments[group_position + 1] if by_position and len(arguments) > group_position + 1 else False
        if is_async or named.get("async_op"):
            work = run(*arguments, **named)
            return work if work is None else TimedWork(work, CLOCK.collective(f"{name}, awaited", count, group))
        with CLOCK.collective(name, count, group):
            return run(*arguments, **named)

    return timed
