"""Reads what is recorded of a run, segment by segment: its sealed record, or of an older run the files that say what it is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.common.config.field_effects import flat_fields
from recipes.common.config.json_files import JsonError, laid_out, read_json
from recipes.common.run_dir.difference import Difference
from recipes.common.run_dir.differences import find_differences
from recipes.common.run_dir.run_files import read_run
from recipes.common.run_dir.segments import FOLDER, LAYOUT_CHANGE, PATCH, RESUME, START, Segment, read_segments
from tools.common.console import UsageError

_SEGMENT = re.compile(r"(.+):(\d+)", re.ASCII)


@dataclass(frozen=True)
class RunRecord:
    """A run, or a log, with what is recorded of it."""

    source: Path
    segments: tuple[Segment, ...]  # in order; none of a log
    sealed: bool  # from the run's record; else gathered from recipe.json, deepspeed.json and run.json
    chosen: int | None = None  # the segment that was asked for

    def at(self, step: int) -> Segment | None:
        """Return the segment in force at a step, as the run went in the end."""
        if self.chosen is not None:
            return next(segment for segment in self.segments if segment.index == self.chosen)
        return next((segment for segment in reversed(self.segments) if segment.step < step), None)

    def patch(self, segment: Segment) -> bytes | None:
        """Return the uncommitted changes of a segment, where they are kept."""
        path = self.source / FOLDER / f"{segment.index:05d}.{PATCH}"
        return path.read_bytes() if path.is_file() else None

    def steps(self) -> tuple[int, int | None]:
        """Return (the first step, the last one) of the segment that was asked for, as the run went in the end; None: no end."""
        if self.chosen is None:
            return 0, None
        here = self.at(0)
        assert here is not None
        later = [segment.step for segment in self.segments if segment.index > here.index]
        return here.step + 1, min(later, default=None)


def open_record(text: str) -> RunRecord:
    """Read "RUN", "RUN:SEGMENT" or a log. Raises UsageError for one that is not there."""
    path, chosen = Path(text), None
    if not path.exists() and (match := _SEGMENT.fullmatch(text)) and Path(match[1]).exists():
        path, chosen = Path(match[1]), int(match[2])
    if not path.exists():
        raise UsageError(f"{path}: no such run directory or log")
    if path.is_file():
        if chosen is not None:
            raise UsageError(f"{text}: a log has no segments; name a run directory")
        return RunRecord(path, (), sealed=False)
    segments = tuple(read_segments(path))
    record = RunRecord(path, segments or _of_run_files(path), bool(segments), chosen)
    if chosen is not None and chosen not in (known := [segment.index for segment in record.segments]):
        have = f"it has {', '.join(map(str, known))}" if known else "nothing is recorded of it"
        raise UsageError(f"{text}: {path} has no segment {chosen}; {have}")
    return record


def segment_changes(record: RunRecord) -> list[tuple[Segment, list[Difference]]]:
    """Return each segment with what changed since the one before it: nothing at the first."""
    found: list[tuple[Segment, list[Difference]]] = []
    for before, segment in zip((None, *record.segments), record.segments, strict=False):
        patches = (None, None) if before is None else (record.patch(before), record.patch(segment))
        found.append((segment, [] if before is None else find_differences(before.facts, segment.facts, patches)))
    return found


def _of_run_files(run_dir: Path) -> tuple[Segment, ...]:
    """Return a segment for each start that run.json knows, with the facts that the files of that time hold."""
    run, newest = read_run(run_dir), _json(run_dir / "recipe.json")
    if run is None or newest is None:
        return ()
    segments: list[Segment] = []
    with laid_out(run_dir / "run.json"):
        for index, start in enumerate(run["starts"], 1):
            step = start.get("resumed_step") or 0
            cause = START if index == 1 else RESUME
            if index > 1 and start.get("layout") != run["starts"][index - 2].get("layout"):
                cause = LAYOUT_CHANGE
            recipe, deepspeed = (_file_of_start(run_dir, name, run["starts"][index:]) for name in ("recipe", "deepspeed"))
            segments.append(
                Segment(
                    index=index,
                    cause=cause,
                    step=step,
                    attempt=index,
                    time=str(start.get("time", "")),
                    run_id=run["run_id"],
                    previous="",
                    facts=_facts(recipe or newest, deepspeed or {}, start),
                    origins={},
                    hash="",
                )
            )
    return tuple(segments)


def _file_of_start(run_dir: Path, name: str, later: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return recipe.json or deepspeed.json of a start: as the first of the later starts found it, if one replaced it."""
    for start in later:
        kept = run_dir / f"{name}.before_step_{(start.get('resumed_step') or 0) + 1:08d}.json"
        if kept.is_file():
            return _json(kept)
    return _json(run_dir / f"{name}.json")


def _facts(recipe: Mapping[str, Any], deepspeed: Mapping[str, Any], start: Mapping[str, Any]) -> dict[str, Any]:
    facts = {f"recipe.{name}": value for name, value in flat_fields(recipe).items()}
    facts |= {f"deepspeed.{name}": value for name, value in _flat(deepspeed).items()}
    facts |= {f"layout.{name}": value for name, value in start.get("layout", {}).items()}
    facts |= {f"package.{name}.version": value for name, value in start.get("versions", {}).items() if name != "python"}
    facts |= {f"data.{Path(name).name}.hash": value for name, value in start.get("data", {}).items()}
    sizes = start.get("sizes", {})
    facts |= {f"sizes.{name}": sizes[name] for name in ("world", "data", "accumulation", "tokens_per_step") if name in sizes}
    if "git" in start:
        facts |= {f"git.{name}": value for name, value in start["git"].items()}
    device = start.get("device", {})
    known = {
        "library.python": start.get("versions", {}).get("python"),
        "library.cuda": device.get("cuda"),
        "host.0.gpus": [device["name"]] if device.get("name") else None,
        "host.0.cpus": device.get("cpus"),
        "host.0.name": start.get("host"),
    }
    return json.loads(json.dumps(facts | {name: value for name, value in known.items() if value is not None}))


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def _json(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except (OSError, JsonError):
        return None
