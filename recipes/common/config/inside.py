"""Says whether a file that a list names lies inside its folder: a list from elsewhere must not lead to other files."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any


def outside(folder: Path, name: Any) -> str:
    """Return why `name` is not the name of a file inside `folder`; "" if it is.

    The folder itself may be a link. A link in it may lead to another place in it and, since the Hugging Face hub's cache holds
    `snapshots/REVISION/FILE` as links to `blobs/HASH` of the same repository, to those.
    """
    if why := leads_out(name):
        return why
    path, real = folder / name, folder.resolve()
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:  # a circle of links
        return f"{name!r} is a link that leads nowhere ({error})"
    if target.is_relative_to(real) or (path.is_file() and _in_hub_cache(real, target)):
        return ""
    return f"{name!r} is a link to {target}, out of the folder; copy the file itself into it"


def leads_out(name: Any) -> str:
    """Return why `name` by itself, wherever links lead, is not the name of a file in a folder; "" if it is."""
    if not isinstance(name, str) or not name or "\0" in name or not _is_text(name):
        return f"{name!r} is no file name"
    pure = PurePosixPath(name)
    return f"{name!r} leads out of the folder" if pure.is_absolute() or ".." in pure.parts else ""


def _is_text(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # a lone surrogate, which JSON can hold
        return False
    return True


def _in_hub_cache(folder: Path, target: Path) -> bool:
    caches = (parent.parent for parent in (folder, *folder.parents) if parent.name == "snapshots")
    return any(target.parent == cache / "blobs" for cache in caches)
