"""Names, replaces, deletes and sets aside the folders of a run's checkpoints, a rename at a time: each is whole or not there.

Deletes nothing but what has a name that a run gives. What cannot be deleted or renamed is told, and costs nothing else.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from pathlib import Path

from recipes.common.checkpoint.files import sync
from recipes.common.run_dir.checkpoint_folders import checkpoint_step, sealed_checkpoints, sealed_folders, step_folder

_INTERRUPTED = re.compile(r"\.(?P<name>step_\d+)(\.[^/]*)?\.(?P<what>saving|deleting|replaced)(\.\d+)?")  # names that we make


def publish_folder(hidden: Path, folder: Path) -> list[str]:
    """Give a sealed folder its name, and point `latest` at it. Each step is atomic. Return what was in the way, a line each."""
    remarks = []
    if os.path.lexists(folder):  # the same step, saved again after a resume
        old = _free_name(folder.with_name(f".{folder.name}.replaced"))
        os.replace(folder, old)
        os.replace(hidden, folder)
        remarks += _delete(old)
    else:
        os.replace(hidden, folder)
    sync(folder.parent)
    return remarks + _point_latest(folder)


def _point_latest(folder: Path) -> list[str]:
    """Make `latest` a link to a checkpoint, for people: no start reads it. Return what was in the way."""
    latest, pointer, remarks = folder.with_name("latest"), folder.with_name(".latest"), []
    try:
        if latest.exists() and not latest.is_symlink():  # a copy that followed links has a folder there
            aside = _free_name(latest.with_name("latest.set_aside"))
            os.replace(latest, aside)
            remarks.append(f"{latest} was no link: it is {aside.name} now")
        pointer.unlink(missing_ok=True)
        pointer.symlink_to(folder.name)
        os.replace(pointer, latest)
        sync(folder.parent)
    except OSError as error:  # a file system without links, say
        remarks.append(f"{latest} does not point at the newest checkpoint: {error}")
    return remarks


def delete_checkpoint(folder: Path) -> list[str]:
    """Delete a checkpoint, which never is half there under its name. Return what stays, a line for each."""
    hidden = _free_name(folder.with_name(f".{folder.name}.deleting"))
    try:
        os.replace(folder, hidden)
        return _delete(hidden)
    except Exception as error:  # of any kind: the run needs no room now
        return [f"{folder} could not be deleted and stays: {error}"]


def clear_interrupted(checkpoints: Path) -> list[str]:
    """Delete what interrupted saves and deletions left, and nothing that has another name. Return what stays, a line for each.

    A checkpoint whose replacement was interrupted between two renames gets its name back.
    """
    remarks = []
    for path in sorted(checkpoints.glob(".*")):
        found = _INTERRUPTED.fullmatch(path.name)
        if found is None:
            continue
        folder = checkpoints / found["name"]
        if found["what"] != "replaced" or os.path.lexists(folder):
            remarks += _delete(path)
            continue
        try:
            os.replace(path, folder)
        except OSError as error:
            remarks.append(f"{path} is a checkpoint that cannot be renamed to {folder.name}: {error}")
    return remarks


def _delete(folder: Path) -> list[str]:
    """Delete a folder of ours. What cannot be deleted (NFS keeps open files, an administrator protects some) stays."""
    errors: list[BaseException] = []
    shutil.rmtree(folder, onerror=lambda function, path, raised: errors.append(raised[1]))
    return [f"{folder} could not be deleted and stays: {errors[0]}"] if errors else []


def _free_name(path: Path) -> Path:
    """Return the first of NAME, NAME.2, NAME.3, ... that is free."""
    names = (path if number == 1 else path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def abandon_later(out_dir: Path, step: int) -> list[Path]:
    """Move the checkpoints after `step`, from which the run resumes, to checkpoints/abandoned, where no resume looks.

    Return their new paths. What an earlier rewind left there is deleted: the folder holds no more than a run keeps.
    """
    later = [folder for folder in sealed_checkpoints(out_dir) if checkpoint_step(folder) > step]
    if not later:
        return []
    _point_latest(step_folder(out_dir, step))
    abandoned = out_dir / "checkpoints" / "abandoned"
    for folder in sealed_folders(abandoned):
        _delete(folder)
    abandoned.mkdir(exist_ok=True)
    moved = []
    for folder in reversed(later):  # newest first: if interrupted, those that are left are nearest to `step`
        moved.insert(0, _free_name(abandoned / folder.name))
        os.replace(folder, moved[0])
    return moved
