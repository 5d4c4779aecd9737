"""Writes and reads the record of a run: `segments/00001.json`, a sealed entry for each part of it that one state of things made.

An entry is added at a start, a resume, a live rewind, and a resume in another layout. It says everything that may have changed
since the one before, as flat facts ("recipe.batch.seq_len", "package.torch.version", "environment.NCCL_ALGO"), and holds the hash
of that one: an entry that is edited, removed or moved breaks the chain, and `read_chain` says where. Facts hold no time, and not
where the run lies, so that an identical rerun has equal facts, and a copy of a run is the run.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from recipes.common.config.json_files import JsonError, laid_out, read_json

FOLDER = "segments"
VERSION = 1
START, RESUME, REWIND, LAYOUT_CHANGE = CAUSES = ("start", "resume", "rewind", "layout change")
PATCH = "git.patch"  # the fact that holds the hash of an entry's patch; the patch is beside the entry, `00001.git.patch`
_NAME = re.compile(r"(\d{5,})\.json", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One entry of a run's record."""

    index: int  # from 1
    cause: str  # one of CAUSES
    step: int  # the last step before it: 0 at a fresh start, the checkpoint's at a resume or rewind
    attempt: int  # which start of the run's processes, from 1; a rewind belongs to the one that it happens in
    time: str  # UTC, ISO 8601
    run_id: str  # that of run.json
    previous: str  # the hash of the entry before; "" in the first
    facts: dict[str, Any]  # dotted name -> a value as JSON holds it
    origins: dict[str, str]  # name of a fact -> where its value comes from, where it comes from different places
    hash: str  # of all the rest


def append_segment(
    run_dir: Path,
    *,
    cause: str,
    step: int,
    attempt: int,
    run_id: str,
    facts: Mapping[str, Any],
    origins: Mapping[str, str] | None = None,
    patch: bytes | None = None,
) -> Segment:
    """Add an entry to a run's record, and return it. It is on disk, whole, when this returns. Rank 0, which holds the folder.

    patch: the uncommitted changes whose hash (`content_hash`) is the fact PATCH. At a start, the record of another run that used
    the folder before is set aside.
    """
    assert cause in CAUSES, cause
    folder = run_dir / FOLDER
    if cause == START and os.path.lexists(folder):
        _set_aside(folder)
    folder.mkdir(parents=True, exist_ok=True)
    last = max(_numbered(folder), default=0)
    content = {
        "version": VERSION,
        "index": last + 1,
        "cause": cause,
        "step": step,
        "attempt": attempt,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "run_id": run_id,
        "previous": _hash_of(folder, last),
        "facts": dict(facts),
        "origins": dict(origins or {}),
    }
    content = json.loads(json.dumps(content))  # as it will be read
    content["hash"] = _seal(content)
    name = f"{last + 1:05d}"
    if patch is not None:
        _write(folder / f"{name}.{PATCH}", patch)
    _write(folder / f"{name}.json", json.dumps(content, indent=1).encode() + b"\n")
    return _segment(content, f"{name}.json")


def read_segments(run_dir: Path) -> list[Segment]:
    """Return a run's entries, in order; none where it has no record. Raises JsonError, naming every entry that is not readable.

    Whether they are as they were written is another question: `read_chain`.
    """
    segments, unreadable = _read_all(run_dir / FOLDER)
    if unreadable:
        raise JsonError("; ".join(unreadable.values()))
    return [segments[number] for number in sorted(segments)]


def read_chain(run_dir: Path) -> tuple[list[Segment], list[str]]:
    """Return the entries that can be read, and what breaks their chain, a line each: whatever was edited, removed or moved."""
    folder = run_dir / FOLDER
    segments, unreadable = _read_all(folder)
    problems = []
    before = 0
    for number in sorted([*segments, *unreadable]):
        if number > before + 1:
            missing = f"{before + 1:05d}.json" + (f" to {number - 1:05d}.json" if number > before + 2 else "")
            problems.append(f"{FOLDER}/{missing} is missing: removed, or renamed")
        before = number
        if number in unreadable:
            problems.append(unreadable[number])
        else:
            found = _link_problems(folder, segments[number], number, segments)
            problems += [f"{FOLDER}/{number:05d}.json {what}" for what in found]
    return [segments[number] for number in sorted(segments)], problems


def changed_facts(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return the names of the facts that are not equal, or in one of the two only, in the order of `after`."""
    names = dict.fromkeys((*after, *before))
    return [n for n in names if (n in before) != (n in after) or not equal_values(before[n], after[n])]


def equal_values(one: Any, other: Any) -> bool:
    """Whether two values of a fact are equal: 1 is 1.0, True is not 1, and NaN is NaN."""
    return canonical(one) == canonical(other) or canonical(_with_whole_numbers(one)) == canonical(_with_whole_numbers(other))


def canonical(value: Any) -> bytes:
    """Return a value as JSON with one way to write it: equal values, equal bytes; NaN is equal to itself."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _with_whole_numbers(value: Any) -> Any:
    """Return a value with an integer for each float that is one."""
    if isinstance(value, Mapping):
        return {key: _with_whole_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_with_whole_numbers(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def content_hash(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def _link_problems(folder: Path, segment: Segment, number: int, segments: Mapping[int, Segment]) -> list[str]:
    """Return what is wrong with the entry in the file of `number`."""
    problems = []
    if _seal({"version": VERSION} | asdict(segment)) != segment.hash:
        problems.append("was edited: its content has another hash than it says")
    if segment.index != number:
        problems.append(f"holds entry {segment.index}: entries were moved")
    before = segments.get(number - 1)
    if number == 1 and segment.previous:
        problems.append("is not the first entry: it follows one that is not there")
    elif before is not None and segment.previous != before.hash:
        problems.append(f"does not follow {number - 1:05d}.json, which is not the entry that was there when it was written")
    kept, told = folder / f"{number:05d}.{PATCH}", segment.facts.get(PATCH)
    if kept.is_file() and content_hash(kept.read_bytes()) != told:
        problems.append(f"has another patch beside it than it says ({kept.name} was edited)")
    return problems


def _read_all(folder: Path) -> tuple[dict[int, Segment], dict[int, str]]:
    """Return number of the file -> entry, and number -> why it cannot be read."""
    segments, unreadable = {}, {}
    for number, path in sorted(_numbered(folder).items()):
        try:
            segments[number] = _segment(read_json(path), f"{FOLDER}/{path.name}")
        except (OSError, JsonError) as error:
            unreadable[number] = f"{FOLDER}/{path.name} cannot be read: {error}"
    return segments, unreadable


def _segment(content: Mapping[str, Any], name: str) -> Segment:
    """Return an entry from its file's content. Raises JsonError for one that is not laid out so."""
    version = content.get("version")
    if version != VERSION:
        raise JsonError(f"{name}: of version {version!r}, this version reads {VERSION}")
    with laid_out(name):
        counts = {key: content[key] for key in ("index", "step", "attempt")}
        texts = {key: content[key] for key in ("cause", "time", "run_id", "previous", "hash")}
        groups = {key: content[key] for key in ("facts", "origins")}
        kinds = ((counts, int), (texts, str), (groups, dict))
        wrong = [key for values, kind in kinds for key, value in values.items() if type(value) is not kind]
        wrong += sorted(set(content) - {"version", *counts, *texts, *groups})
        if wrong or content["cause"] not in CAUSES:
            raise TypeError(f"{', '.join(wrong) or 'cause'} does not belong there")
        return Segment(**counts, **texts, **groups)


def _seal(content: Mapping[str, Any]) -> str:
    return content_hash(canonical({key: value for key, value in content.items() if key != "hash"}))


def _hash_of(folder: Path, number: int) -> str:
    """Return the hash that the next entry names. Of one that cannot be read, that of its bytes: that one breaks the chain."""
    if not number:
        return ""
    path = folder / f"{number:05d}.json"
    try:
        return _segment(read_json(path), path.name).hash
    except (OSError, JsonError):
        return content_hash(path.read_bytes()) if path.is_file() else content_hash(b"")


def _numbered(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    return {int(match[1]): path for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)) and int(match[1])}


def _set_aside(folder: Path) -> None:
    """Rename to the first free of segments.before, segments.before.2, ..."""
    names = (f"{folder.name}.before" if n == 1 else f"{folder.name}.before.{n}" for n in itertools.count(1))
    os.replace(folder, next(kept for name in names if not os.path.lexists(kept := folder.with_name(name))))


def _write(path: Path, content: bytes) -> None:
    """Write a file under a hidden name and rename it, both on disk."""
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with hidden.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(hidden, path)
    finally:
        hidden.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
