"""One save in flight: a thread writes this rank's part, and on rank 0 another seals when all parts are on disk.

Whatever goes wrong in either thread, of any kind, is kept as the save's error; nothing is raised into a thread's void, where the
other ranks would wait for a report that never comes.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipes.common.checkpoint.files import (
    Part,
    merge_index,
    seal,
    write_model_folder,
    write_rank_file,
)
from recipes.common.checkpoint.folders import publish_folder
from recipes.common.config.json_files import read_json, write_json
from recipes.common.recipe import Recipe, from_root
from recipes.common.run_dir.metrics import one_line
from recipes.common.run_dir.run_files import recipe_to_dict

_POLL_SECONDS = 0.02  # between the sealing thread's checks for the other ranks' reports


class SaveInFlight:
    """Writes at once. `failed` may be asked at any time; `wait_for_own_part`, then `end`, once."""

    def __init__(
        self,
        folder: Path,
        hidden: Path,
        rank: int,
        state: dict[str, Any],
        recipe: Recipe,
        parts: Callable[[], list[Part]],
        token: str,
        confirm: Callable[[], None],
    ) -> None:
        """hidden: the folder's name until it is sealed, used by no other save. parts: copies what this rank writes.

        token: of the attempt, in every file. confirm: called before the folder gets its name; raises where it must not.
        """
        self.folder, self.seconds = folder, 0.0
        self.remarks: list[str] = []  # on rank 0, once sealed: what was in the way
        self._hidden, self._rank, self._state, self._recipe = hidden, rank, state, recipe
        self._token, self._confirm = token, confirm
        self._parts: list[Part] = []
        self._error: str | None = None
        self._seal_error: str | None = None
        self._abandon = threading.Event()
        self._started = time.perf_counter()
        self._writer: threading.Thread | None = None
        self._sealer: threading.Thread | None = None
        try:
            self._parts = parts()
            self._writer = _start(self._write, "checkpoint writer")
            self._sealer = _start(self._seal_when_whole, "checkpoint sealer") if rank == 0 else None
        except Exception as error:  # no memory for the copy, no thread: the save's error, not the run's
            self._error = self._own(error)

    def failed(self) -> bool:
        """Whether this rank knows already that the save cannot succeed."""
        return self._error is not None or self._seal_error is not None

    def wait_for_own_part(self) -> str | None:
        """Wait until this rank's part is on disk. Return what went wrong."""
        if self._writer is not None:
            self._writer.join()
        self._parts = []
        return self._error

    def end(self, *, abandon: bool) -> str | None:
        """Wait for the seal, or abandon it. On rank 0, return None when the checkpoint is sealed, else what went wrong."""
        if abandon:
            self._abandon.set()
        if self._rank != 0:
            return None
        if self._sealer is not None:
            self._sealer.join()
        shutil.rmtree(self._hidden, ignore_errors=True)
        return self._seal_error or ("abandoned" if abandon or self._sealer is None else None)

    def _own(self, error: BaseException) -> str:
        return f"rank {self._rank}: {one_line(error)}"

    def _write(self) -> None:
        try:
            self._hidden.mkdir(parents=True, exist_ok=True)
            report = write_rank_file(self._hidden, self._rank, self._parts, self._token)
            write_json(self._report(self._rank), report)
        except BaseException as error:
            self._error = self._own(error)

    def _report(self, rank: int) -> Path:
        return self._hidden / f".rank_{rank:05d}.json"

    def _seal_when_whole(self) -> None:
        try:
            missing = set(range(self._state["world_size"]))
            while missing:
                if self._abandon.wait(_POLL_SECONDS):
                    return
                missing = {rank for rank in missing if not self._report(rank).exists()}
            self._seal()
        except BaseException as error:
            self._seal_error = f"sealing: {one_line(error)}"
        self.seconds = time.perf_counter() - self._started

    def _seal(self) -> None:
        reports = [read_json(self._report(rank)) for rank in range(self._state["world_size"])]
        write_json(self._hidden / "index.json", merge_index(reports))
        write_json(self._hidden / "state.json", self._state)
        write_json(self._hidden / "recipe.json", recipe_to_dict(self._recipe))
        write_model_folder(self._hidden / "model", self._recipe.model, from_root(self._recipe.tokenizer))
        for rank in range(len(reports)):
            self._report(rank).unlink()
        seal(self._hidden, {report["file"]: report for report in reports}, self._token)
        self._confirm()
        self.remarks = publish_folder(self._hidden, self.folder)


def _start(work: Callable[[], None], name: str) -> threading.Thread:
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread
