"""Opens a run directory: gathers the run's facts from all hosts and adds an entry to its record, at each start and live rewind.

Rank 0's host gives the facts. The first rank of every other host compares its own with them and sends what differs, which becomes
"host.3.package.torch.version"; every rank sends the little that it has of its own. The record ends no run: what cannot be found
out is a fact of its own, "record.failed.PART", and remarked once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from recipes.common.data.blend import data_folders
from recipes.common.engine.trainer import Trainer
from recipes.common.parallel.json_messages import broadcast_json, gather_json
from recipes.common.recipe import Layout, Recipe, Sizes, from_root
from recipes.common.record.data_content import data_facts, folder_names
from recipes.common.record.environment import environment_facts
from recipes.common.record.machine import device_of, host_facts, host_key, library_facts, rank_facts
from recipes.common.record.packages import package_facts
from recipes.common.record.recipe_facts import algorithm_facts, deepspeed_facts, plan_facts, recipe_facts
from recipes.common.record.source_code import code_facts
from recipes.common.run_dir.differences import describe_changes, find_differences
from recipes.common.run_dir.run_files import note_segment, recipe_to_dict, write_run_files
from recipes.common.run_dir.run_log import RunLog
from recipes.common.run_dir.segments import (
    FOLDER,
    LAYOUT_CHANGE,
    RESUME,
    REWIND,
    START,
    Segment,
    append_segment,
    changed_facts,
    read_chain,
)

FAILED = "record.failed."
ABSENT = None  # of a fact that rank 0's host has and another has not
_SHOWN = 6  # names of changed facts in a remark
_LAYOUT = ("layout.", "sizes.world")


@dataclass
class Gathered:
    """Facts as they are found out, with the patch of uncommitted changes."""

    facts: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    patch: bytes | None = None

    def add(self, part: str, find: Callable[[], Any]) -> None:
        """Add what `find` returns: facts, or facts and origins. An error of any kind becomes the fact that it happened."""
        try:
            found = find()
            facts, origins = found if isinstance(found, tuple) else (found, {})
            self.facts |= facts
            self.origins |= origins
        except Exception as error:
            self.facts[FAILED + part] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]

    def failures(self) -> list[str]:
        """Return the parts that could not be found out, a line each."""
        failed = {name: text for name, text in self.facts.items() if FAILED in name}
        return [f"the record does not hold {name.replace(FAILED, '')}: {text}" for name, text in failed.items()]


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a start of a run knows of itself, for the record."""

    recipe: Recipe
    layout: Layout
    sizes: Sizes
    ds_config: Mapping[str, Any]
    resumed_step: int | None
    skips: Sequence[tuple[int, int]]
    lr_factors: Sequence[tuple[int, int, float]]  # of rewinds: after this step, up to that one, the rate's factor
    reading: Mapping[str, Any]  # the present order of reading, as JSON
    accepted: Sequence[Mapping[str, Any]]  # the changes of the recipe that --accept allowed


def open_run_dir(out_dir: Path, told: Told, trainer: Trainer) -> RunLog | None:
    """Write into the run directory what this start is, and return its log, on rank 0. Collective: the record is of all hosts."""
    if trainer.grid.rank != 0:
        record_start(out_dir, told, trainer, None)
        return None
    recipe = recipe_to_dict(told.recipe)
    run = write_run_files(
        out_dir,
        recipe,
        told.ds_config,
        layout=told.layout,
        sizes=told.sizes,
        resumed_step=told.resumed_step,
        data={name: reading["identity"] for name, reading in told.reading["readings"].items()},
        skips=told.skips,
        order=told.reading,
        accepted=told.accepted,
    )
    names = {"name": told.recipe.name, "run_id": run["run_id"]}
    log = RunLog(out_dir, **names, run_steps=told.recipe.steps, resumed_step=told.resumed_step, config=recipe)
    for remark in record_start(out_dir, told, trainer, run):
        log.note(remark)
    return log


def record_start(out_dir: Path, told: Told, trainer: Trainer, run: Mapping[str, Any] | None) -> list[str]:
    """Add the entry of a start or resume. Returns remarks for the log. Collective over all ranks.

    run: the content of run.json, on rank 0.
    """
    gathered = Gathered() if run is None else _of_this_run(told, getattr(trainer.engine, "_config", None))
    spare = out_dir / FOLDER if dist.get_rank() == 0 else None
    gather_hosts(gathered, told.recipe, trainer.grid.device, spare)
    if run is None:
        return []
    before = _newest(out_dir) if told.resumed_step is not None else None
    step, attempt = told.resumed_step or 0, len(run["starts"])
    cause = START if told.resumed_step is None else RESUME
    if before is not None and any(name.startswith(_LAYOUT) for name in changed_facts(before.facts, gathered.facts)):
        cause = LAYOUT_CHANGE
    return _append(out_dir, gathered, before, cause=cause, step=step, attempt=attempt, run_id=run["run_id"])


def record_rewind(
    out_dir: Path, recipe: Recipe, step: int, skips: Iterable[tuple[int, int]], lr_factors: Iterable[tuple[int, int, float]]
) -> list[str]:
    """Add the entry of a live rewind to `step`: the facts of the start, with what a rewind changes, and the data as it is now."""
    before = _newest(out_dir)
    if before is None:
        return [f"the record has no entry of this rewind: {out_dir / FOLDER} has none of the start"]
    now = Gathered(facts={n: v for n, v in before.facts.items() if not n.startswith("data.")}, origins=dict(before.origins))
    now.add("data", lambda: _data_facts(recipe, out_dir / FOLDER))
    now.facts |= _course_facts(skips, lr_factors)
    return _append(out_dir, now, before, cause=REWIND, step=step, attempt=before.attempt, run_id=before.run_id)


def gather_hosts(gathered: Gathered, recipe: Recipe, device: torch.device, spare: Path | None) -> None:
    """Add to `gathered` what hosts and ranks are, on rank 0. Collective over all ranks. spare: see `data_facts`."""
    rank = dist.get_rank()
    ranks = gather_json(_of_this_rank(device), device)
    keys = list(dict.fromkeys(each["host"] for each in ranks))
    leaders = [next(r for r, each in enumerate(ranks) if each["host"] == key) for key in keys]
    leads, own, here = rank in leaders, Gathered(), Gathered()
    if leads:
        own = of_this_host(recipe, spare)
        here.add("host", host_facts)
    hosts = [{"host": here.facts, "differs": {}}]
    if len(leaders) > 1:
        first = broadcast_json(own.facts, device)
        differs = {name: own.facts.get(name, ABSENT) for name in changed_facts(first, own.facts)} if leads and rank else {}
        told = gather_json({"host": here.facts, "differs": differs} if leads else None, device)
        hosts = [told[leader] for leader in leaders]
    if rank == 0:
        gathered.facts |= own.facts | facts_of_ranks(ranks, keys) | facts_of_hosts(hosts, ranks, keys)
        gathered.origins |= own.origins
        gathered.patch = own.patch


def of_this_host(recipe: Recipe, spare: Path | None = None, *, data_seconds: float | None = None) -> Gathered:
    """Return the facts that are those of every rank of this host: code, packages, libraries, data."""
    own = Gathered()
    own.add("packages", package_facts)
    own.add("libraries", library_facts)
    own.add("code", lambda: _with_patch(own))
    own.add("data", lambda: _data_facts(recipe, spare, data_seconds))
    return own


def facts_here(recipe: Recipe, device: torch.device, *, data_seconds: float) -> dict[str, Any]:
    """Return what a record would hold of this machine, if a run of one rank began in this process: all but what it was told."""
    found = of_this_host(recipe, data_seconds=data_seconds)
    found.add("environment", lambda: environment_facts(os.environ))
    found.add("settings", lambda: rank_facts(device))
    found.add("algorithms", lambda: algorithm_facts(recipe))
    found.add("host", lambda: {f"host.0.{name}": value for name, value in host_facts().items()})
    kinds = [device_of(torch.device("cuda", index))[0] for index in range(torch.cuda.device_count())]
    return found.facts | ({"host.0.gpus": kinds} if kinds else {})


def facts_of_ranks(ranks: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, Any]:
    """Return "rank_hosts", rank 0's own facts, and as "rank.R.NAME" those of other ranks that are not equal to its."""
    first = ranks[0]["facts"]
    facts: dict[str, Any] = {"rank_hosts": [keys.index(each["host"]) for each in ranks], **first}
    for number, each in enumerate(ranks[1:], 1):
        for name in changed_facts(first, each["facts"]):
            facts[f"rank.{number}.{name}"] = each["facts"].get(name, ABSENT)
    return facts


def facts_of_hosts(hosts: Sequence[Mapping[str, Any]], ranks: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, Any]:
    """Return "host.I.NAME" of each host: what it is, its GPUs in the order of ranks, and where it is not as rank 0's."""
    facts: dict[str, Any] = {}
    for number, (key, host) in enumerate(zip(keys, hosts, strict=True)):
        devices = [each["device"] for each in ranks if each["host"] == key]
        gpus = {"gpus": [kind for kind, _ in devices if kind], "gpu_serials": [serial for _, serial in devices if serial]}
        own = {**host["host"], **{name: values for name, values in gpus.items() if values}, **host["differs"]}
        facts |= {f"host.{number}.{name}": value for name, value in own.items()}
    return facts


def _of_this_rank(device: torch.device) -> dict[str, Any]:
    own = Gathered()
    own.add("environment", lambda: environment_facts(os.environ))
    own.add("settings", lambda: rank_facts(device))
    try:
        host, kind = host_key(), list(device_of(device))
    except Exception:  # a driver that does not answer
        host, kind = "", [device.type, ""]
    return {"host": host, "device": kind, "facts": own.facts}


def _of_this_run(told: Told, resolved_ds_config: object) -> Gathered:
    """resolved_ds_config: DeepSpeed's own, with its defaults."""
    own = Gathered()
    own.add("recipe", lambda: recipe_facts(told.recipe))
    own.add("deepspeed", lambda: deepspeed_facts(told.ds_config, resolved_ds_config))
    own.add("plan", lambda: plan_facts(told.recipe, told.layout, told.sizes))
    own.facts |= _course_facts(told.skips, told.lr_factors)
    return own


def _course_facts(skips: Iterable[tuple[int, int]], lr_factors: Iterable[tuple[int, int, float]]) -> dict[str, Any]:
    return {"run.skips": [list(skip) for skip in skips], "run.lr_factors": [list(each) for each in lr_factors]}


def _with_patch(own: Gathered) -> dict[str, Any]:
    facts, own.patch = code_facts()
    return facts


def _data_facts(recipe: Recipe, spare: Path | None, seconds: float | None = None) -> tuple[dict[str, Any], dict[str, str]]:
    names = {name: from_root(path) for name, path in folder_names(data_folders(recipe)).items()}
    return data_facts(names, from_root(recipe.tokenizer), spare, **({} if seconds is None else {"seconds": seconds}))


def _newest(out_dir: Path) -> Segment | None:
    """Return the newest entry that can be read."""
    try:
        segments, _ = read_chain(out_dir)
    except OSError:
        return None
    return segments[-1] if segments else None


def _changes(before: Segment, facts: Mapping[str, Any]) -> str:
    """Return what changed, the gravest first, and how much of it can change the loss."""
    try:
        return describe_changes(find_differences(before.facts, json.loads(json.dumps(facts))))
    except Exception:  # a fact of a kind that nobody expected: its name says enough
        return ", ".join(changed_facts(before.facts, facts)[:_SHOWN])


def _append(out_dir: Path, gathered: Gathered, before: Segment | None, **entry: Any) -> list[str]:
    remarks = gathered.failures()
    if before is not None and (text := _changes(before, gathered.facts)):
        remarks.append(f"changed since {FOLDER}/{before.index:05d}.json: {text}")
    try:
        segment = append_segment(out_dir, **entry, facts=gathered.facts, origins=gathered.origins, patch=gathered.patch)
        note_segment(out_dir, segment.hash)
    except Exception as error:  # a full disk, a fact that JSON does not have: the run goes on without
        what = f"{type(error).__name__}: {error}"
        return [*remarks, f"the record has no entry of this {entry['cause']}: {what}"]
    return remarks
