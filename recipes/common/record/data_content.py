"""Says what a prepared folder of data holds, down to its shards: not only what was prepared, but what lies there now.

`dataset.json` has the checksum of each file as it was written. That the bytes are still those is read off the disk, for at most
READ_SECONDS at a start: first the files that changed since they were last read (by size, times and inode), or since the folder
was prepared, then those that were never read. What was read is remembered beside the data, or in the run where that may not be
written, so the next start reads only what changed. On a folder too large for that, `tools.changed check RUN` reads the rest,
once. A file that nobody has read yet counts as it was prepared, and its origin says so; one that was written to since does not.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.common.config.json_files import read_json, write_json
from recipes.common.data.shards import SPLITS, data_identity, read_manifest, split_shards, tokenizer_hash

READ_SECONDS = 1.0
KNOWN = ".read_contents.json"  # beside the data
MOST_SHARDS = 2000  # that have a fact each
READ, REMEMBERED, PREPARED = "read", "read before", "as prepared, not read since"
WRITTEN = "written to since it was read, not read again"
_PIECE_BYTES = 8 << 20
_READERS = 4


@dataclass(frozen=True, kw_only=True)
class Content:
    """A file of a folder: its hash, as well as it is known, and how it is known."""

    hash: str
    origin: str  # READ, REMEMBERED, PREPARED or WRITTEN


def data_facts(
    names: Mapping[str, Path], tokenizer: Path, spare: Path | None = None, *, seconds: float = READ_SECONDS
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return "data.FOLDER.*" of each folder and "tokenizer.hash", and the origins of what was or was not read.

    names: name in the facts -> folder. spare: a folder that may be written, for what should be remembered of others.
    """
    facts, origins = {}, {}
    until = time.monotonic() + seconds
    for name, folder in names.items():
        found, known = folder_facts(folder, spare, until - time.monotonic())
        facts |= {f"data.{name}.{key}": value for key, value in found.items()}
        origins |= {f"data.{name}.{key}": value for key, value in known.items()}
    try:
        facts["tokenizer.hash"] = tokenizer_hash(tokenizer)
    except (OSError, ValueError):
        facts["tokenizer.hash"] = None
    return facts, origins


def folder_names(paths: Sequence[str]) -> dict[str, str]:
    """Return name in the facts -> path, for paths in a recipe: the last part, so that data may lie elsewhere and be the same."""
    names: dict[str, str] = {}
    for path in paths:
        last = Path(path).name or path
        number = sum(Path(other).name == last for other in names.values())
        names[last if not number else f"{last}~{number + 1}"] = path
    return names


def folder_facts(folder: Path, spare: Path | None, seconds: float) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the facts of one folder, without their prefix, and the origins of those that are read off files."""
    try:
        manifest = read_manifest(folder)
    except (OSError, ValueError) as error:
        return {"hash": None, "problem": f"{type(error).__name__}: {error}".replace(str(folder), "DIR")}, {}
    facts = {"hash": data_identity(folder), "tokenizer": manifest["tokenizer_hash"], "inputs": manifest.get("inputs_hash")}
    shards = {shard.file.removesuffix(".bin"): shard.checksums for split in SPLITS for shard in split_shards(manifest, split)}
    prepared = {file: digest for checksums in shards.values() for file, digest in checksums.items()}
    contents = read_contents(folder, prepared, spare, seconds)
    origins, all_hashes = {}, []
    for shard, checksums in shards.items():
        now = {file: contents[file].hash for file in checksums}
        told = next(iter(now.values())) if len(now) == 1 else _hash_of(f"{file} {digest}" for file, digest in now.items())
        all_hashes.append(f"{shard} {told}")
        if len(shards) <= MOST_SHARDS or now != checksums:
            facts[shard], origins[shard] = told, _worst(contents[file].origin for file in checksums)
    facts["shards"], facts["contents"] = len(shards), _hash_of(all_hashes)
    origins["contents"] = _worst(content.origin for content in contents.values())
    return facts, origins


def read_contents(folder: Path, prepared: Mapping[str, str], spare: Path | None, seconds: float) -> dict[str, Content]:
    """Return the content of each file of `prepared` (name -> checksum when it was written), reading for `seconds` at most.

    A file that is not there, or not readable, has the hash "". seconds: infinity to read all that is not remembered.
    """
    places = [folder / KNOWN, *([] if spare is None else [spare / f"{KNOWN[1:-5]}_{_hash_of([str(folder)])[7:19]}.json"])]
    known, stamps = _known(places), {name: _stamp(folder / name) for name in prepared}
    contents = {name: Content(hash="", origin=READ) for name, stamp in stamps.items() if stamp is None}
    for name, stamp in stamps.items():
        entry = known.get(name)
        if stamp is not None and isinstance(entry, dict) and entry.get("stamp") == stamp and isinstance(entry.get("hash"), str):
            contents[name] = Content(hash=entry["hash"], origin=REMEMBERED)
    since = (folder / "dataset.json").stat().st_mtime_ns
    unread = [name for name in prepared if name not in contents]
    unread.sort(key=lambda name: (name not in known and stamps[name][1] <= since, -stamps[name][1]))  # the suspect ones first
    digests = _digests(folder, unread, seconds)
    for name in unread:
        if name in digests:
            contents[name] = Content(hash=digests[name], origin=READ)
        elif _is_same_file(known.get(name), stamps[name]):
            contents[name] = Content(hash=WRITTEN, origin=WRITTEN)
        else:
            contents[name] = Content(hash=prepared[name], origin=PREPARED)
    read = {name: {"stamp": stamps[name], "hash": digests[name]} for name in digests if _stamp(folder / name) == stamps[name]}
    if read:
        _remember(places, {name: entry for name, entry in known.items() if name in prepared} | read)
    return contents


def _digests(folder: Path, names: Sequence[str], seconds: float) -> dict[str, str]:
    """Hash files on several threads until the time is over; a file that is not read to its end by then is left out."""
    until = time.monotonic() + seconds

    def digest(name: str) -> str | None:
        found = hashlib.sha256()
        try:
            with (folder / name).open("rb", buffering=0) as file:
                while time.monotonic() < until:
                    if not (piece := file.read(_PIECE_BYTES)):
                        return f"sha256:{found.hexdigest()}"
                    found.update(piece)
        except OSError:
            return ""
        return None

    if not names:
        return {}
    with ThreadPoolExecutor(min(_READERS, len(os.sched_getaffinity(0)))) as pool:  # hashing releases the interpreter
        return {name: found for name, found in zip(names, pool.map(digest, names), strict=True) if found is not None}


def _stamp(path: Path) -> list[int] | None:
    """Return size, time of the last change, of the last change of that, and inode: another content has another one."""
    try:
        state = path.stat()
    except OSError:
        return None
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]


def _is_same_file(entry: Any, stamp: list[int]) -> bool:
    """Whether a file that has another stamp than when it was read is that file, not a copy of it in its place."""
    before = entry.get("stamp") if isinstance(entry, dict) else None
    return isinstance(before, list) and len(before) == len(stamp) and before[-1] == stamp[-1]


def _known(places: Iterable[Path]) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for place in places:
        try:
            known |= read_json(place)
        except (OSError, ValueError):  # not there, or damaged: it is read again
            continue
    return known


def _remember(places: Iterable[Path], known: Mapping[str, Any]) -> None:
    for place in places:
        try:
            write_json(place, known)
            return
        except OSError:  # a folder that may only be read
            continue


def _worst(origins: Iterator[str]) -> str:
    found = set(origins)
    return next((origin for origin in (WRITTEN, PREPARED, READ, REMEMBERED) if origin in found), READ)


def _hash_of(lines: Iterable[str]) -> str:
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()
