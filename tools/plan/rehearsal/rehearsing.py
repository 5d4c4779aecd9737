"""Starts a process that rehearses, and hands it jobs."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

from recipes.common.recipe import ROOT
from tools.common.console import CheckError, UsageError
from tools.common.devices import Device
from tools.plan.rehearsal.rehearsal_case import Rehearsal
from tools.plan.rehearsal.shim import ShimError


class Rehearser:
    """One process that rehearses jobs one after another, and imports while its owner does other things. Use it in a `with`."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tools.plan.rehearsal.worker"]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._stand_in: str | None = None

    def __enter__(self) -> Rehearser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.terminate()
        self._process.wait()

    @property
    def stand_in(self) -> str:
        """What stands for CUDA there. Raises UsageError where nothing can."""
        if self._stand_in is None:
            said = self._read()
            if isinstance(said, ShimError):
                raise UsageError(str(said))
            self._stand_in = said
        return self._stand_in

    def start(self, rehearsal: Rehearsal, device: Device, prepare: Callable[..., None] | None = None) -> None:
        """Begin a rehearsal, whose `result` is to be asked for. prepare: changes the trainer first."""
        assert self.stand_in
        pickle.dump((rehearsal, device, prepare), self._process.stdin)
        self._process.stdin.flush()

    def result(self) -> dict[str, Any]:
        """Return what `rehearsed_step.rehearse` does. Raises CheckError where the rank's own code fails, with its traceback."""
        result = self._read()
        if isinstance(result, Exception):
            raise CheckError(f"the rehearsed rank failed:\n{result}")
        return result

    def _read(self) -> Any:
        try:
            return pickle.load(self._process.stdout)  # our own child's bytes
        except EOFError:
            raise CheckError(f"the process that rehearses ended with exit code {self._process.wait()}") from None
