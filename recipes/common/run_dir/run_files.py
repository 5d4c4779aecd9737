"""Writes the files that say what a run is: `recipe.json`, `deepspeed.json`, `run.json`. Rank 0, before step 1.

All are resolved: nothing else has to be read to know what was trained, and how. With which code, packages and machines, and on
which data, is in the run's record (recipes.common.run_dir.segments). Each is replaced at once: a reader sees the old file or the
new one. A resume keeps what it replaces (`recipe.before_step_00000121.json`) and adds itself to `starts` in run.json.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from recipes.common.config.json_files import read_json, write_json
from recipes.common.recipe import Layout, Recipe, Sizes


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as JSON can hold it. Each dataclass and the HF config keep their class name under "class".

    `config` classes of transformers are read back by CONFIG_MAPPING[d["model_type"]].from_dict(d).
    """
    return to_plain(recipe)


def to_plain(value: Any) -> Any:
    """Return a value of a recipe as JSON can hold it."""
    if hasattr(value, "to_dict"):  # a transformers config; a dataclass as well, but that leaves out its model_type
        return {"class": type(value).__name__, **to_plain(value.to_dict())}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(key): to_plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain(inner) for inner in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)  # torch.dtype and the like


def write_run_files(
    out_dir: Path,
    recipe: Mapping[str, Any],
    deepspeed: Mapping[str, Any],
    *,
    layout: Layout,
    sizes: Sizes,
    resumed_step: int | None = None,
    data: Mapping[str, str] | None = None,
    skips: Sequence[tuple[int, int]] = (),
    order: Mapping[str, Any] | None = None,
    accepted: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Write the three files and return the content of run.json (its "run_id" is equal over all starts of a run).

    recipe: from `recipe_to_dict`. deepspeed: from `merge_ds_config`. resumed_step: None for a fresh
    start. data: the identity of every folder that is read. skips: sequences that are skipped. order: where the present order of
    reading begins, as JSON. accepted: the changes of the recipe that --accept allowed.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, content in (("recipe.json", recipe), ("deepspeed.json", deepspeed)):
        _replace(out_dir / name, content, resumed_step)
    path = out_dir / "run.json"
    run = read_run(out_dir)
    if run is None and os.path.lexists(path):
        _set_aside(path, resumed_step)
    elif run is not None and resumed_step is None:  # another run's, in a directory used before
        _keep(path, None)
        run = None
    if run is None:
        run = {"run_id": uuid.uuid4().hex[:12], "name": recipe["name"], "starts": []}
    start = _start(layout, sizes, resumed_step)
    start |= {"data": dict(data or {}), "skips": [list(skip) for skip in skips]}
    start |= {"reading": dict(order)} if order else {}
    run["starts"].append(start | ({"accepted": [dict(change) for change in accepted]} if accepted else {}))
    write_json(path, run)
    return run


def read_run(out_dir: Path) -> dict[str, Any] | None:
    """Return run.json, in which every start and rewind is a dict; None without it, or where it is damaged."""
    run = _read(out_dir / "run.json")
    if not isinstance(run, dict) or not isinstance(run.get("run_id"), str) or "starts" not in run:
        return None
    lists = (run["starts"], run.get("history", []))
    return run if all(isinstance(entries, list) and all(isinstance(e, dict) for e in entries) for entries in lists) else None


def note_segment(out_dir: Path, seal: str) -> None:
    """Add the hash of an entry of the record to the present start: that the newest entry is still there can then be told."""
    run = read_run(out_dir)
    if run is not None and run["starts"]:
        run["starts"][-1].setdefault("segments", []).append(seal)
        write_json(out_dir / "run.json", run)


def _start(layout: Layout, sizes: Sizes, resumed_step: int | None) -> dict[str, Any]:
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "resumed_step": resumed_step,
        "command": [sys.executable, *sys.argv],
        "working_directory": os.getcwd(),
        "world_size": sizes.world,
        "layout": dataclasses.asdict(layout) | {"layers_per_stage": list(layout.layers_per_stage)},  # as JSON gives it back
        "sizes": dataclasses.asdict(sizes),
    }


def _replace(path: Path, content: Any, resumed_step: int | None) -> None:
    """Write `content`, and keep the file that it replaces where that one differs."""
    old = _read(path)
    if old is None and os.path.lexists(path):
        _set_aside(path, resumed_step)
    elif old is not None and old != json.loads(json.dumps(content)):
        _keep(path, resumed_step)
    write_json(path, content)


def _set_aside(path: Path, resumed_step: int | None) -> None:
    print(f"{path} is damaged: it is {_keep(path, resumed_step).name} now, and begins anew", file=sys.stderr, flush=True)


def _keep(path: Path, resumed_step: int | None) -> Path:
    """Rename to the first free of recipe.before_step_00000121.json, recipe.before_step_00000121.2.json, ..."""
    stem = f"{path.stem}.before_step_{(resumed_step or 0) + 1:08d}"
    names = (f"{stem}.json" if number == 1 else f"{stem}.{number}.json" for number in itertools.count(1))
    kept = next(kept for name in names if not os.path.lexists(kept := path.with_name(name)))
    os.replace(path, kept)
    return kept


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None
