"""Counts and forbids the host's waits for a real GPU, by torch's own detection; on a CPU, operators that ask for a value do.

torch sees what its own operators do (a value asked for, a copy from or to memory that is not pinned). It does not see waits for
events and streams.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from deepspeed.runtime.pipe.schedule import OptimizerStep

from recipes.common.engine.trainer import Trainer
from tests.support.waits import Waits, line_of

SYNC_WARNING = "called a synchronizing CUDA operation"


@contextmanager
def counted(device: str) -> Iterator[Counter[str]]:
    """Count the waits within, by file and line."""
    if device == "cpu":
        with Waits() as waits:
            yield waits.by_line
        return
    found: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            for warning in caught:
                if SYNC_WARNING in str(warning.message):
                    found[line_of(warning.filename, warning.lineno)] += 1


@contextmanager
def forbidden_in_micro_batches(trainer: Trainer, set_mode: Callable[[str], object]) -> Iterator[None]:
    """Let a step within raise where any of its passes, or its reduction of gradients, waits; its optimizer step may.

    set_mode: torch.cuda.set_sync_debug_mode.
    """
    engine, was_micro = trainer.engine, trainer.run_micro_batches
    own = vars(engine).copy()

    def run_micro_batches(*arguments: object) -> None:
        set_mode("error")
        was_micro(*arguments)

    def take_step(*arguments: object, **options: object) -> None:
        set_mode("default")
        their_step(*arguments, **options)

    if trainer.grid.pipeline > 1:
        their_step = engine._INSTRUCTION_MAP[OptimizerStep]
        engine._INSTRUCTION_MAP = engine._INSTRUCTION_MAP | {OptimizerStep: take_step}
    else:
        their_step = engine._take_model_step
        engine._take_model_step = take_step
    trainer.run_micro_batches = run_micro_batches
    try:
        yield
    finally:
        set_mode("default")
        del trainer.run_micro_batches
        for name in ("_INSTRUCTION_MAP", "_take_model_step"):
            vars(engine).pop(name, None)
            if name in own:
                vars(engine)[name] = own[name]
