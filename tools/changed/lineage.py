"""Shows the record of a run as a chain: each start, resume, rewind and change of layout, and whether the chain is unbroken.

    python -m tools.changed lineage runs/mine

An entry that was removed, edited, moved or sealed anew is named, and the exit code is 1. run.json names the entries too: a newest
one that is gone is missed there.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.common.run_dir.run_files import read_run
from recipes.common.run_dir.segments import FOLDER, Segment, changed_facts, read_chain
from tools.common.console import FAILED, GOOD, UsageError, table

SHOWN = 4  # names of changed facts in a row


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """A run's chain, and what is wrong with it."""

    segments: list[Segment]
    problems: list[str]  # each breaks the chain
    remarks: list[str]  # what is not in the chain and need not be


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")


def run(flags: argparse.Namespace) -> int:
    found = read_lineage(flags.run)
    if flags.json:
        print(json.dumps(as_json(found)))
    else:
        print(report(found))
    return FAILED if found.problems else GOOD


def read_lineage(run_dir: Path) -> Lineage:
    """Return a run's chain, held against run.json. Raises UsageError for a folder that has neither."""
    segments, problems = read_chain(run_dir)
    manifest = read_run(run_dir)
    starts = manifest["starts"] if manifest is not None else []
    named = [(number, seal) for number, start in enumerate(starts, 1) for seal in _seals(start)]
    if not segments and not problems and not named:
        raise UsageError(f"{run_dir} has no record: it is no run directory, or an earlier version wrote it")
    there = {segment.hash for segment in segments}
    problems += [
        f"{FOLDER}/ does not hold the entry {seal[7:19]} that start {number} of run.json names: removed, edited or sealed anew"
        for number, seal in named
        if seal not in there
    ]
    if manifest is not None:
        run_id = manifest["run_id"]
        strangers = [f"{segment.index:05d}.json" for segment in segments if segment.run_id != run_id]
        problems += [f"{FOLDER}/{name} is of another run than run.json ({run_id})" for name in strangers]
    remarks = [f"start {number} of run.json has no entry" for number, start in enumerate(starts, 1) if not _seals(start)]
    if manifest is None:
        remarks.append("run.json is not there or damaged: whether the newest entry is still there cannot be told")
    known = {seal for _, seal in named}
    remarks += [
        f"{FOLDER}/{segment.index:05d}.json is not named by run.json"
        for segment in segments
        if manifest is not None and segment.hash not in known
    ]
    return Lineage(segments=segments, problems=problems, remarks=remarks)


def as_json(found: Lineage) -> dict[str, Any]:
    changes = _changes(found.segments)
    entries = [
        {
            "index": segment.index,
            "cause": segment.cause,
            "step": segment.step,
            "attempt": segment.attempt,
            "time": segment.time,
            "hash": segment.hash,
            "previous": segment.previous,
            "facts": len(segment.facts),
            "changed": changed,
        }
        for segment, changed in zip(found.segments, changes, strict=True)
    ]
    return {"unbroken": not found.problems, "problems": found.problems, "remarks": found.remarks, "segments": entries}


def report(found: Lineage) -> str:
    rows = [
        [segment.index, segment.cause, segment.step, segment.attempt, segment.time, segment.hash[7:19], _named(changed)]
        for segment, changed in zip(found.segments, _changes(found.segments), strict=True)
    ]
    lines = [table(rows, ["entry", "cause", "step", "start", "time", "hash", "changed since the one before"])] if rows else []
    lines += [f"note: {remark}" for remark in found.remarks]
    count = f"{len(rows)} entr{'y' if len(rows) == 1 else 'ies'}"
    lines += [f"broken: {problem}" for problem in found.problems] or [f"the chain is unbroken: {count}"]
    return "\n".join(lines)


def _changes(segments: list[Segment]) -> list[list[str]]:
    pairs = zip((None, *segments), segments, strict=False)
    return [[] if before is None else changed_facts(before.facts, segment.facts) for before, segment in pairs]


def _named(changed: list[str]) -> str:
    more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
    return ", ".join(changed[:SHOWN]) + more


def _seals(start: dict[str, Any]) -> list[str]:
    seals = start.get("segments", [])
    return [seal for seal in seals if isinstance(seal, str)] if isinstance(seals, list) else []
