"""Compares the uncommitted changes that two runs trained with: which files, how many lines, and what they can change."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from recipes.common.config.fact_effects import effect_of_path
from recipes.common.config.field_effects import Effect
from recipes.common.run_dir.difference import ABSENT, Difference, differ


def patch_files(patch: bytes) -> dict[str, int]:
    """Return path -> number of added and removed lines of a patch of git."""
    found: dict[str, int] = {}
    path, in_hunk = None, False
    for line in patch.decode("utf-8", "replace").splitlines():
        if line.startswith("diff --git "):
            match = re.fullmatch(r'diff --git "?a/(.*?)"? "?b/(.*?)"?', line)
            path, in_hunk = (match[2] if match else line), False
            found.setdefault(path, 0)
        elif line.startswith("@@ "):
            in_hunk = True
        elif path is not None:
            found[path] += (in_hunk and line[:1] in ("+", "-")) or line.startswith(("Binary files ", "GIT binary patch"))
    return found


def patch_differences(
    before: Mapping[str, Any], after: Mapping[str, Any], names: Sequence[str], patches: tuple[bytes | None, bytes | None]
) -> Iterator[Difference]:
    """Yield what differs in the uncommitted changes, a difference for each effect, with the files and their numbers of lines."""
    if "git.patch" not in names:
        return
    kept = [patch if patch is not None or before_or_after.get("git.patch") else b"" for patch, before_or_after in
            zip(patches, (before, after), strict=True)]  # fmt: skip
    if None in kept:
        same = before.get("code.hash", ABSENT) == after.get("code.hash")
        effect, note = (Effect.NOTHING, "the code that trains is the same") if same else (None, "its patch is not at hand")
        yield differ(before, after, "git.patch", effect, f"uncommitted changes: {note}")
        return
    sections = [patch_lines(patch or b"") for patch in kept]
    changed = [path for path in dict.fromkeys((*sections[0], *sections[1])) if sections[0].get(path) != sections[1].get(path)]
    by_effect: dict[Effect, list[str]] = {}
    for path in changed:
        by_effect.setdefault(effect_of_path(path), []).append(path)
    counts = [patch_files(patch or b"") for patch in kept]
    for effect, paths in by_effect.items():
        old, new = (", ".join(f"{path} ({_lines(c[path])})" for path in paths if path in c) or "as committed" for c in counts)
        yield Difference("git.patch", old, new, effect, "uncommitted changes of files")
    if not changed:  # the same lines, written in another way
        yield differ(before, after, "git.patch", Effect.NOTHING, "uncommitted changes of the same files and lines")


def _lines(count: int) -> str:
    return f"{count} line{'s' * (count != 1)}"


def patch_lines(patch: bytes) -> dict[str, list[str]]:
    """Return path -> the changed lines of a patch: without places and blob names, which other lines move."""
    found: dict[str, list[str]] = {}
    path = ""
    for line in patch.decode("utf-8", "replace").splitlines():
        if line.startswith("diff --git "):
            path = next(iter(patch_files(line.encode())))
            found[path] = []
        elif path and not line.startswith(("@@ ", "index ")):
            found[path].append(line)
    return found
