"""The checks that every rank runs in a preflight, rank 0 included, each reported under its step's name."""

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
from tools.preflight.kernels import kernel_facts
from tools.preflight.rendezvous import RankInfo, Rendezvous, answer_clock, bounded, receive, report, second_connection
from tools.preflight.storage import storage_facts

SAMPLE_SECONDS = 5.0  # a host, for comparing checksums of shards


def run_checks(rendezvous: Rendezvous, me: RankInfo, recipe_path: str, wait_seconds: float) -> int:
    """Run what rank 0 announces, on every other rank; return the exit code that rank 0 gives."""
    roster = receive(rendezvous, "roster", wait_seconds)
    if "exit" not in roster:
        leads = me.rank in roster["leaders"]
        if leads:
            report_host(rendezvous, roster, recipe_path)
        if me.rank in receive(rendezvous, "clocks", wait_seconds):
            answer_clock(rendezvous)
        storage = receive(rendezvous, "storage word", wait_seconds)
        if leads and storage["nonce"]:
            report_storage(rendezvous, roster, storage)
        devices = receive(rendezvous, "device type", wait_seconds)
        report_device(rendezvous, me, devices)
        plan = receive(rendezvous, "plan", wait_seconds)
        if plan["measure"]:
            measure(rendezvous, me, plan)
    code = receive(rendezvous, "exit code", wait_seconds)
    report(rendezvous, "left", None)
    return code


def report_host(rendezvous: Rendezvous, roster: Mapping[str, Any], recipe_path: str) -> None:
    host = (roster["leaders"].index(rendezvous.rank), len(roster["leaders"]))
    work = partial(host_facts, recipe_path, host, SAMPLE_SECONDS)
    report(rendezvous, "host facts", bounded(work, "gathering the host's facts", rendezvous.limit_seconds))


def report_storage(rendezvous: Rendezvous, roster: Mapping[str, Any], storage: Mapping[str, Any]) -> None:
    host = (roster["leaders"].index(rendezvous.rank), len(roster["leaders"]))
    work = partial(storage_facts, Path(storage["out_dir"]).expanduser().absolute(), storage["nonce"], host)
    report(rendezvous, "storage", bounded(work, "writing to the output folder", rendezvous.limit_seconds))


def report_device(rendezvous: Rendezvous, me: RankInfo, devices: Mapping[str, Any]) -> None:
    """Report this rank's device and, on a GPU, which kernels compute the recipe's attention there."""

    def work() -> dict[str, Any]:
        found = device_facts(devices["type"], me.local_rank)
        return found if "error" in found else found | {"attention": kernel_facts(devices["type"], devices["attention"])}

    report(rendezvous, "devices", bounded(work, "asking for the device", rendezvous.limit_seconds))


def measure(rendezvous: Rendezvous, me: RankInfo, plan: Mapping[str, Any]) -> None:
    """Run a matrix product, join the process group, run every group's collectives; report the first failure and skip the rest."""
    device = torch.device("cuda", me.local_rank) if plan["device_type"] == "cuda" else torch.device("cpu")
    seconds = rendezvous.limit_seconds

    def on_device(work: partial) -> Any:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a setting of the thread
        return work()

    product = partial(on_device, partial(product_facts, device))
    report(rendezvous, "compute", bounded(product, "a matrix product", seconds))
    if rendezvous.world_size == 1:
        return
    store = second_connection(rendezvous)
    joining = partial(on_device, partial(join_group, store, rendezvous.rank, rendezvous.world_size, device, seconds))
    joined = bounded(joining, "joining the process group", seconds)
    report(rendezvous, "process group", joined)
    if "error" in joined:
        return
    layout = Layout(**plan["layout"])
    begun: list[str] = []
    found = bounded(partial(on_device, partial(collective_facts, layout, device, plan["leaders"], begun)), "collectives", seconds)
    if "error" in found and begun:
        found["error"] += f", the last begun: {begun[-1]}"
    report(rendezvous, "communication", found)
