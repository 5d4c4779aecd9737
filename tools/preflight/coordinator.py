"""Rank 0's side of a preflight: waits for the ranks, starts every step, judges the facts and reports."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from recipes.common.recipe import FP8, Layout, Recipe
from tools.common.console import SHOW_AFTER_SECONDS
from tools.preflight.host_facts import recipe_hash
from tools.preflight.judge_hosts import clock_notes, host_problems, storage_problems
from tools.preflight.judge_ranks import collective_problems, device_problems, merge_groups, product_problems
from tools.preflight.kernels import fp8_problems, kernel_notes, kernel_problems
from tools.preflight.problems import Problem, majority, named, span, values_of
from tools.preflight.rank_checks import measure, report_device, report_host, report_storage
from tools.preflight.rendezvous import RankInfo, Rendezvous, announce, bounded, clock_offsets, collect, host_names
from tools.preflight.report import PreflightReport, rank_rows, with_exit_code
from tools.preflight.storage import bytes_needed, open_folder, read_answers

GRACE_SECONDS = 3.0  # after a step's limit, for its report to arrive


@dataclass
class Findings:
    """The results that rank 0 has collected so far."""

    hosts: list[str]  # by rank
    leaders: list[int]  # the first rank of each host
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    silent: set[int] = field(default_factory=set)  # ranks that did not report a step
    seconds: dict[str, float] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)  # by host
    clocks: dict[str, dict[str, float]] = field(default_factory=dict)
    storage: dict[str, dict[str, Any]] = field(default_factory=dict)
    devices: dict[int, dict[str, Any]] = field(default_factory=dict)
    products: dict[int, dict[str, Any]] = field(default_factory=dict)
    collectives: dict[int, list[dict[str, Any]]] = field(default_factory=dict)


@contextmanager
def step(found: Findings, name: str) -> Iterator[None]:
    started = time.monotonic()
    if sum(found.seconds.values()) > SHOW_AFTER_SECONDS:
        print(f"preflight: {name} ...", file=sys.stderr, flush=True)
    yield
    found.seconds[name] = time.monotonic() - started


def coordinate(
    rendezvous: Rendezvous,
    me: RankInfo,
    recipe: Recipe,
    layout: Layout,
    *,
    recipe_path: str,
    out_dir: str,
    given_hosts: list[tuple[str, int]],
    join_seconds: float,
) -> PreflightReport:
    """Run the preflight and return the report on all ranks, with every problem found."""
    started = time.monotonic()
    joined = _wait_for_ranks(rendezvous, join_seconds)
    hosts = host_names(joined, rendezvous.world_size, given_hosts)
    found = Findings(hosts=hosts, leaders=[hosts.index(host) for host in dict.fromkeys(hosts)])
    found.seconds["joining"] = time.monotonic() - started
    missing = [rank for rank in range(rendezvous.world_size) if rank not in joined]
    if missing:
        found.problems.append(_missing_problem(rendezvous, missing, hosts, join_seconds))
        announce(rendezvous, "roster", {"exit": True})
    else:
        roster = {"leaders": found.leaders}
        announce(rendezvous, "roster", roster)
        with step(found, "hosts"):
            _check_hosts(rendezvous, found, roster, layout, joined, recipe_path)
        with step(found, "storage"):
            _check_storage(rendezvous, found, roster, recipe, out_dir)
        with step(found, "devices"):
            device_type = _check_devices(rendezvous, found, me, recipe, layout)
        with step(found, "measuring"):
            _check_speeds(rendezvous, found, me, layout, device_type)
    groups = merge_groups(found.collectives)
    rows = rank_rows(hosts, layout, products=found.products, groups=groups, storage=found.storage, clocks=found.clocks)
    return with_exit_code(
        PreflightReport(
            recipe=recipe.name,
            world_size=rendezvous.world_size,
            hosts=tuple(dict.fromkeys(hosts)),
            exit_code=0,
            problems=tuple(found.problems),
            notes=tuple(found.notes),
            layout=layout,
            recipe_hash=recipe_hash(recipe),
            rows=() if missing else rows,
            groups=tuple(groups),
            seconds=found.seconds,
        )
    )


def _wait_for_ranks(rendezvous: Rendezvous, join_seconds: float) -> dict[int, RankInfo]:
    started = time.monotonic()

    def show_missing(missing: list[int]) -> None:
        waited = time.monotonic() - started
        who = f"rank{'s' * (len(missing) > 1)} {span(missing)}"
        print(f"preflight: waiting for {who} ({waited:.0f} of {join_seconds:.0f} s)", file=sys.stderr, flush=True)

    joined = collect(rendezvous, "join", range(rendezvous.world_size), join_seconds, show_missing)
    return {rank: RankInfo(**fields) for rank, fields in joined.items()}


def _missing_problem(rendezvous: Rendezvous, missing: list[int], hosts: list[str], join_seconds: float) -> Problem:
    host, port = rendezvous.address
    known = [hosts[rank] for rank in missing if not hosts[rank].startswith("(")]
    return Problem(
        check="joining",
        hosts=tuple(dict.fromkeys(known)),
        ranks=tuple(missing),
        message=f"{named(missing, hosts)} did not reach MASTER_ADDR={host} MASTER_PORT={port} within {join_seconds:.0f} s",
        cure="check that the host is up, that its ranks started (their output), and that it can connect to that address; "
        "--join-seconds waits longer",
    )


def _check_hosts(
    rendezvous: Rendezvous, found: Findings, roster: dict[str, Any], layout: Layout, joined: dict[int, RankInfo], recipe_path: str
) -> None:
    report_host(rendezvous, roster, recipe_path)
    values = _collect_values(rendezvous, found, "host facts", found.leaders)
    found.facts = {found.hosts[rank]: one | {"network": joined[rank].network} for rank, one in values.items()}
    others = [rank for rank in found.leaders[1:] if rank in values]
    announce(rendezvous, "clocks", others)
    offsets = {0: {"offset": 0.0, "uncertainty": 0.0}} | clock_offsets(rendezvous, others)
    found.clocks = {found.hosts[rank]: one for rank, one in offsets.items()}
    ranks_of = {host: [rank for rank, name in enumerate(found.hosts) if name == host] for host in found.facts}
    found.problems += host_problems(found.facts, layout, rendezvous.world_size, ranks_of)
    found.notes += clock_notes(found.clocks)
    unsampled = [host for host, one in found.facts.items() if "data" in one and not one["data"]["sampled_shards"]]
    if unsampled and not any(problem.check == "data" for problem in found.problems):
        found.notes.append(f"no shard was compared on {', '.join(unsampled)}: reading the first took too long")


def _check_storage(rendezvous: Rendezvous, found: Findings, roster: dict[str, Any], recipe: Recipe, out_dir: str) -> None:
    nonce = secrets.token_hex(8)
    folder = Path(out_dir).expanduser().absolute()
    opened = bounded(partial(open_folder, folder, nonce), f"making {folder}", rendezvous.limit_seconds)
    # pass the folder as given: a relative one depends on where the rank was started
    storage = {"out_dir": out_dir, "nonce": nonce if "value" in opened else ""}
    announce(rendezvous, "storage word", storage)
    if "error" in opened:
        cure = "correct --out-dir, or its permissions and its mount"
        message = f"host {found.hosts[0]} cannot make {folder}: {opened['error']}"
        found.problems.append(Problem(check="storage", message=message, cure=cure))
        return
    report_storage(rendezvous, roster, storage)
    values = _collect_values(rendezvous, found, "storage", found.leaders)
    found.storage = {found.hosts[rank]: one for rank, one in values.items()}
    seeing = [found.leaders.index(rank) for rank, one in values.items() if one["sees_word"] and "write_error" not in one]
    answers = bounded(partial(read_answers, folder, nonce, seeing), "reading the hosts' answers", rendezvous.limit_seconds)
    answered = answers.get("value", {"unseen": [], "saved_bytes": 0})
    unseen = [found.hosts[found.leaders[number]] for number in answered["unseen"]]
    needed = bytes_needed(recipe.num_params, recipe.optimizer, recipe.checkpoints.keep_last, answered["saved_bytes"])
    found.problems += storage_problems(found.storage, unseen, needed, str(folder))
    if "error" in answers:
        message = f"host {found.hosts[0]}: {answers['error']}"
        found.problems.append(Problem(check="storage", message=message, cure="check the mount of the output folder"))


def _check_devices(rendezvous: Rendezvous, found: Findings, me: RankInfo, recipe: Recipe, layout: Layout) -> str:
    """Check every rank's device; return the type that most hosts would train on."""
    from recipes.common.checks.attention_kernel import attention_calls, attention_lines  # here: the other ranks save seconds

    types = {host: one["device"] for host, one in found.facts.items() if "device" in one}
    device_type = majority(types) if types else "cpu"
    devices = {"type": device_type, "attention": [asdict(call) for call in attention_calls(recipe, layout)]}
    announce(rendezvous, "device type", devices)
    report_device(rendezvous, me, devices)
    found.devices = _collect_values(rendezvous, found, "devices", range(rendezvous.world_size))
    found.problems += kernel_problems(found.devices, found.hosts)
    found.problems += fp8_problems(found.devices, found.hosts) if recipe.precision == FP8 else []
    found.notes += kernel_notes(found.devices, attention_lines(recipe, layout))
    if device_type == "cuda":
        nvidia = {host: one["nvidia"] for host, one in found.facts.items()}
        found.problems += device_problems(found.devices, nvidia, found.hosts)
        for host, one in nvidia.items():
            if one is None:
                found.notes.append(f"nvidia-smi does not run on {host}: its GPUs were not checked for other users and errors")
                continue
            if not one["health_read"]:
                found.notes.append(f"nvidia-smi on {host} does not report ECC errors and remapped rows")
            if one["xid"] is None:
                found.notes.append(f"the kernel's log on {host} cannot be read: Xid errors were not checked")
    return device_type


def _check_speeds(rendezvous: Rendezvous, found: Findings, me: RankInfo, layout: Layout, device_type: str) -> None:
    ready = all("error" not in found.devices.get(rank, {"error": ""}) for rank in range(rendezvous.world_size))
    plan = {
        "measure": ready,
        "device_type": device_type,
        "layout": {axis: getattr(layout, axis) for axis in ("tensor", "pipeline", "context", "pipeline_schedule", "chunks")},
        "leaders": found.leaders,
    }
    announce(rendezvous, "plan", plan)
    if not ready:
        found.notes.append("matrix products and collectives were skipped: not every rank has a device")
        return
    measure(rendezvous, me, plan)
    everyone = range(rendezvous.world_size)
    found.products = _collect_values(rendezvous, found, "compute", everyone)
    found.problems += product_problems(found.products, found.hosts, device_type)
    if rendezvous.world_size == 1:
        return
    connected = _collect_values(rendezvous, found, "process group", everyone)
    if len(connected) == rendezvous.world_size:
        found.collectives = _collect_values(rendezvous, found, "communication", everyone)
    judged = device_type == "cuda"
    found.problems += collective_problems(merge_groups(found.collectives), found.hosts, judge_speed=judged)
    if not judged:
        found.notes.append("on CPU the speed of groups is shown but not judged: it depends on the cores they wait for")


def _collect_values(rendezvous: Rendezvous, found: Findings, name: str, ranks: list[int] | range) -> dict[int, Any]:
    seconds = rendezvous.limit_seconds + GRACE_SECONDS
    expected = [rank for rank in ranks if rank not in found.silent]  # a rank that hangs is reported and waited for once
    outcomes = collect(rendezvous, name, expected, seconds)
    values, problems = values_of(name, outcomes, expected, found.hosts, seconds)
    found.problems += problems
    found.silent |= set(expected) - set(outcomes)
    return values


def release(rendezvous: Rendezvous, code: int) -> None:
    """Send every rank the exit code, and serve the store until they have exited."""
    announce(rendezvous, "exit code", code)
    present = [rank for rank in range(1, rendezvous.world_size) if rendezvous.store.check([f"join/{rank}"])]
    collect(rendezvous, "left", present, GRACE_SECONDS)
