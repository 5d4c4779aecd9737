"""Says which code runs: the commit of the checkout, the patch of what is not committed, and the code itself, by its hash."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from recipes.common.recipe import ROOT
from recipes.common.record.packages import sources_hash
from recipes.common.run_dir.segments import PATCH, content_hash

SECONDS = 10.0  # for git, on a slow file system
LONGEST_PATCH_BYTES = 4 << 20  # a longer one is known by its hash alone
MOST_NEW_FILES = 100
_NEW = ("recipes", "ds_configs")  # where a file that git does not know yet is part of a run


def code_facts(root: Path = ROOT) -> tuple[dict[str, Any], bytes | None]:
    """Return "git.commit", "git.patch" (a hash; "" where nothing is uncommitted) and "code.hash", and the patch.

    Commit and patch are null where `root` is no checkout that git may read. The patch holds changes of tracked files, and whole
    files that were not added yet in the folders of recipes and ds_configs.
    """
    commit = git_text(root, "rev-parse", "HEAD")
    patch = None if commit is None else uncommitted(root)
    told = None if patch is None else content_hash(patch) if patch else ""
    facts = {"git.commit": commit, PATCH: told, "code.hash": sources_hash(root / "recipes" / "common")}
    return facts, patch if patch and len(patch) <= LONGEST_PATCH_BYTES else None


def git_state(root: Path = ROOT) -> dict[str, Any]:
    """Return the commit of `root`, and whether tracked files differ from it; both null where it is not a checkout."""
    changed = git_text(root, "status", "--porcelain", "--untracked-files=no")
    return {"commit": git_text(root, "rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed)}


def uncommitted(root: Path) -> bytes | None:
    """Return the uncommitted changes as `git apply` takes them; None where git cannot tell."""
    plain = ("--binary", "--no-color", "--no-ext-diff", "--no-textconv", "--src-prefix=a/", "--dst-prefix=b/", "--unified=3")
    patch = _git(root, "diff", *plain, "--relative", "HEAD", "--", ".")
    new = _git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", *_NEW)
    if patch is None or new is None:
        return None
    names = sorted(name.decode(errors="surrogateescape") for name in new.split(b"\0") if name)
    for name in names[:MOST_NEW_FILES]:
        patch += _git(root, "diff", "--no-index", *plain, "--", "/dev/null", name, codes=(0, 1)) or b""
    return patch


def git_text(root: Path, *arguments: str) -> str | None:
    done = _git(root, *arguments)
    return None if done is None else done.decode(errors="replace").strip()


def _git(root: Path, *arguments: str, codes: tuple[int, ...] = (0,)) -> bytes | None:
    """Return what git says; None where there is no git, no repository, or one that belongs to another user."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, timeout=SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode in codes else None
