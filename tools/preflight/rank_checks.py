"""What each rank does in a preflight, rank 0 too: its share of every step, reported under the step's name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from recipes.common.recipe import Layout
from tools.preflight.communication import collective_facts, join_group
from tools.preflight.compute import device_facts, product_facts
from tools.preflight.host_facts import host_facts
from tools.preflight.rendezvous import Meeting, Rank, answer_clock, bounded, hear, report, second_client
from tools.preflight.storage import storage_facts

SAMPLE_SECONDS = 5.0  # of each host, for comparing checksums of shards


def follow(meeting: Meeting, me: Rank, recipe_path: str, patience_seconds: float) -> int:
    """Every rank but 0: do what rank 0 announces, until it says with which code to leave."""
    roster = hear(meeting, "roster", patience_seconds)
    if "leave" not in roster:
        leads = me.rank in roster["leaders"]
        if leads:
            tell_host(meeting, roster, recipe_path)
        if me.rank in hear(meeting, "clocks", patience_seconds):
            answer_clock(meeting)
        storage = hear(meeting, "storage word", patience_seconds)
        if leads and storage["nonce"]:
            tell_storage(meeting, roster, storage)
        devices = hear(meeting, "device type", patience_seconds)
        tell_device(meeting, me, devices["type"])
        plan = hear(meeting, "plan", patience_seconds)
        if plan["measure"]:
            measure(meeting, me, plan)
    code = hear(meeting, "leave", patience_seconds)
    report(meeting, "left", None)
    return code


def tell_host(meeting: Meeting, roster: Mapping[str, Any], recipe_path: str) -> None:
    host = (roster["leaders"].index(meeting.rank), len(roster["leaders"]))
    work = partial(host_facts, recipe_path, host, SAMPLE_SECONDS)
    report(meeting, "host facts", bounded(work, "gathering the host's facts", meeting.limit_seconds))


def tell_storage(meeting: Meeting, roster: Mapping[str, Any], storage: Mapping[str, Any]) -> None:
    host = (roster["leaders"].index(meeting.rank), len(roster["leaders"]))
    work = partial(storage_facts, Path(storage["out_dir"]).expanduser().absolute(), storage["nonce"], host)
    report(meeting, "storage", bounded(work, "writing to the output folder", meeting.limit_seconds))


def tell_device(meeting: Meeting, me: Rank, device_type: str) -> None:
    work = partial(device_facts, device_type, me.local_rank)
    report(meeting, "devices", bounded(work, "asking for the device", meeting.limit_seconds))


def measure(meeting: Meeting, me: Rank, plan: Mapping[str, Any]) -> None:
    """A matrix product; the process group; the collectives of every group. What fails or hangs is told, and the rest left out."""
    device = torch.device("cuda", me.local_rank) if plan["device_type"] == "cuda" else torch.device("cpu")
    seconds = meeting.limit_seconds

    def on_device(work: partial) -> Any:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # it is the thread's own
        return work()

    product = partial(on_device, partial(product_facts, device))
    report(meeting, "compute", bounded(product, "a matrix product", seconds))
    if meeting.world_size == 1:
        return
    store = second_client(meeting)
    joining = partial(on_device, partial(join_group, store, meeting.rank, meeting.world_size, device, seconds))
    joined = bounded(joining, "joining the process group", seconds)
    report(meeting, "process group", joined)
    if "error" in joined:
        return
    layout = Layout(tensor=plan["tensor"], pipeline=plan["pipeline"])
    begun: list[str] = []
    found = bounded(partial(on_device, partial(collective_facts, layout, device, plan["leaders"], begun)), "collectives", seconds)
    if "error" in found and begun:
        found["error"] += f", the last begun: {begun[-1]}"
    report(meeting, "communication", found)
