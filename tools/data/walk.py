"""Walks an input folder of tools.data prepare, and counts what is left out of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tools.data.compressed import uncompressed

SKIPPED_FOLDERS = ("site-packages", "dist-packages", "__pycache__")  # skipped inside an input folder, as hidden ones are
SHOWN = 8  # kinds of files left out that are named


class LeftOut:
    """Counts the files that are not read, by the reason, with one example each."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.examples: dict[str, str] = {}

    def add(self, reason: str, path: str | Path) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.examples.setdefault(reason, os.fspath(path))

    def add_ending(self, path: Path) -> None:
        """Count a file by its ending, with that of its compression: `.csv.gz`."""
        plain = uncompressed(path.name)
        ending = os.path.splitext(plain)[1] + path.name[len(plain) :]
        self.add(ending.lower() or "without an ending", path)

    def text(self) -> str:
        """Return one line, the most frequent reasons first; "" if nothing was left out."""
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        words = [f"{count} {reason} ({self.examples[reason]}{', ...' if count > 1 else ''})" for reason, count in ordered[:SHOWN]]
        if rest := ordered[SHOWN:]:
            words.append(f"{sum(count for _, count in rest)} of {len(rest)} other kinds")
        return ", ".join(words)


def walk(root: Path, excluded: set[str], left: LeftOut, out: Path | None = None) -> Iterator[Path]:
    """Yield the files below `root` in a fixed order, each once: links are followed, to what was not read yet.

    out: the folder that is written, which is no input where it lies below `root`.

    Raises OSError for a folder that cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_fail):
        if out is not None and out.is_dir() and Path(folder) != root and os.path.samefile(folder, out):
            folders.clear()
            left.add("folder of --out", folder)
            continue
        if not _first_time(Path(folder), seen):
            folders.clear()
            left.add("linked folders that were read already", folder)
            continue
        for name in folders:
            if name.startswith(".") and name not in excluded:
                left.add("hidden", Path(folder, name))
        folders[:] = sorted(name for name in folders if name not in excluded and not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if name.startswith("."):
                left.add("hidden", path)
            elif not path.exists():
                left.add("broken links", path)
            elif not path.is_file():
                left.add("no regular files", path)
            elif not _first_time(path, seen):
                left.add("linked files that were read already", path)
            else:
                yield path


def _first_time(path: Path, seen: set[tuple[int, int]]) -> bool:
    """Return whether a file or folder is met for the first time; copies by hard links count as others."""
    state = path.stat()
    key = (state.st_dev, state.st_ino)
    if key in seen and (path.is_dir() or state.st_nlink == 1 or path.is_symlink()):
        return False
    seen.add(key)
    return True


def _fail(error: OSError) -> None:
    raise error
