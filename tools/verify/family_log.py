"""Keeps verdicts in a file of JSON lines, so that a sweep that was ended continues where it was."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from recipes.common.config.json_files import open_lines
from tools.common.console import UsageError
from tools.verify.family_verdict import FamilyVerdict, installed_versions


class FamilyLog:
    """Verdicts by (family, layout). Those of other versions are kept in the file, and judged again."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._found: dict[tuple[str, str], FamilyVerdict] = {}
        if path is None or not path.exists():
            return
        *whole, torn = path.read_bytes().split(b"\n")
        if torn:  # half a verdict, of a sweep that was killed
            os.truncate(path, path.stat().st_size - len(torn))
        for number, line in enumerate(whole, 1):
            try:
                verdict = FamilyVerdict(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise UsageError(f"--log {path}: line {number} is no verdict ({error}); name another file") from error
            if verdict.versions == installed_versions():
                self._found[verdict.family, verdict.layout] = verdict

    def find(self, family: str, layout: str) -> FamilyVerdict | None:
        return self._found.get((family, layout))

    def add(self, verdict: FamilyVerdict) -> None:
        if self._path is not None:
            with open_lines(self._path) as file:
                file.write((json.dumps(asdict(verdict)) + "\n").encode())
