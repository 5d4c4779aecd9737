"""Finds problems in the facts of all ranks: GPUs, slow or wrong products and collectives. Pure."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tools.common.console import human_bytes
from tools.preflight.problems import Problem, by_host, majority, named, odd_ones, span

SLOW_PRODUCT = {"cuda": 0.85, "cpu": 0.5}  # of the ranks' median speed; GPUs of one kind differ by a few percent
SLOW_GROUP = 0.5  # of the median of the other groups of its kind
USED_MIB = 1024  # of a free GPU's memory: the driver and services take less
PROGRAM_XIDS = (13, 31, 43, 45)  # caused by a program's own faults or its end, not by the GPU (NVIDIA's Xid catalogue)


@dataclass(frozen=True, kw_only=True)
class GroupResult:
    """One collective in one group, merged from all its ranks' measurements."""

    kind: str
    operation: str
    ranks: tuple[int, ...]
    bus_bytes_per_second: float  # of its slowest rank: a collective ends with its last
    wrong: Mapping[int, str]


def device_problems(devices: Mapping[int, Mapping[str, Any]], nvidia: Mapping[str, Any], hosts: Sequence[str]) -> list[Problem]:
    """Check that every rank has its own healthy GPU of one kind.

    devices: rank -> `device_facts`. nvidia: host -> `nvidia_facts`. hosts: by rank.
    """
    problems = []
    for rank, one in devices.items():
        if "error" in one:
            cure = "give the job one GPU a rank; check `nvidia-smi -L` and CUDA_VISIBLE_DEVICES there"
            message = f"{named([rank], hosts)}: {one['error']}"
            problems.append(Problem(check="devices", hosts=(hosts[rank],), ranks=(rank,), message=message, cure=cure))
    problems += _shared_devices(devices, hosts)
    names = {named([rank], hosts): one["name"] for rank, one in devices.items() if "name" in one}
    usual = majority(names) if names else None
    odd = [rank for rank, one in devices.items() if one.get("name", usual) != usual]
    for host in dict.fromkeys(hosts[rank] for rank in odd):
        own = [rank for rank in odd if hosts[rank] == host]
        message = f"{named(own, hosts)}: the device is {devices[own[0]]['name']}, the majority's is {usual}"
        cure = "give all ranks the same kind of device: the slowest sets the pace"
        problems.append(Problem(check="devices", hosts=(host,), ranks=tuple(own), message=message, cure=cure))
    return problems + _nvidia_problems(devices, nvidia, hosts)


def _shared_devices(devices: Mapping[int, Mapping[str, Any]], hosts: Sequence[str]) -> list[Problem]:
    users: dict[tuple[str, str], list[int]] = {}
    for rank, one in devices.items():
        if one.get("uuid"):
            users.setdefault((hosts[rank], one["uuid"]), []).append(rank)
    cure = "start one rank for each GPU: LOCAL_RANK must count the ranks of a host"
    return [
        Problem(check="devices", hosts=(host,), ranks=tuple(ranks), message=f"{named(ranks, hosts)} share GPU {uuid}", cure=cure)
        for (host, uuid), ranks in users.items()
        if len(ranks) > 1
    ]


def _nvidia_problems(devices: Mapping[int, Mapping[str, Any]], nvidia: Mapping[str, Any], hosts: Sequence[str]) -> list[Problem]:
    """Check what nvidia-smi and the kernel report about the GPUs that the ranks use."""
    busy: dict[str, str] = {}
    ill: dict[str, str] = {}
    errors: dict[str, str] = {}
    drivers: dict[str, str] = {}
    for host, facts in nvidia.items():
        if facts is None:
            continue
        used = {one["uuid"].removeprefix("GPU-") for rank, one in devices.items() if hosts[rank] == host and one.get("uuid")}
        gpus = {uuid: gpu for uuid, gpu in facts["gpus"].items() if uuid.removeprefix("GPU-") in used}
        drivers[host] = ", ".join(sorted({gpu["driver"] for gpu in gpus.values()}))
        taken = []
        for uuid, gpu in gpus.items():
            if facts["busy"].get(uuid):
                taken.append(f"{uuid} is used by processes {', '.join(map(str, facts['busy'][uuid]))}")
            elif (gpu["used_mib"] or 0) > USED_MIB:
                taken.append(f"{uuid} has {gpu['used_mib']} MiB in use by processes that are not visible from here")
        faults = [f"{uuid}: {fault}" for uuid, gpu in gpus.items() for fault in gpu["faults"]]
        serious = [line for line in facts["xid"] or [] if _xid(line) not in PROGRAM_XIDS]
        for found, lines in ((busy, taken), (ill, faults), (errors, serious)):
            if lines:
                found[host] = "; ".join(lines[:4]) + (f"; and {len(lines) - 4} more" if len(lines) > 4 else "")
    names = list(nvidia)
    return (
        by_host("devices", busy, names, "end those processes (`nvidia-smi`), or wait for the previous job to exit")
        + by_host("devices", ill, names, "reset the GPU (`nvidia-smi --gpu-reset`) or exclude the host")
        + by_host(
            "devices", errors, names, "the kernel reported a GPU error in the last day: drain the host and run `dcgmi diag -r 3`"
        )
        + odd_ones("devices", "the driver", drivers, "install driver {usual} there")
    )


def _xid(line: str) -> int | None:
    found = re.search(r"Xid \([^)]*\): (\d+)", line)
    return int(found[1]) if found else None


def product_problems(products: Mapping[int, Mapping[str, Any]], hosts: Sequence[str], device_type: str) -> list[Problem]:
    """Find ranks with a slow or wrong matrix product. products: rank -> `product_facts`."""
    if not products:
        return []
    usual = statistics.median(one["flops_per_second"] for one in products.values())
    least = SLOW_PRODUCT[device_type]
    problems = []
    for rank, one in sorted(products.items(), key=lambda item: item[1]["flops_per_second"]):
        if one["flops_per_second"] < least * usual:
            message = (
                f"{named([rank], hosts)} multiplies matrices at {one['flops_per_second'] / 1e9:,.1f} GFLOP/s, the median of "
                f"{len(products)} ranks is {usual / 1e9:,.1f} ({one['flops_per_second'] / usual:.0%}; {least:.0%} is allowed)"
            )
            cure = "check for other processes (`top`, `nvidia-smi`), heat and power limits (`nvidia-smi -q -d PERFORMANCE`) there"
            problems.append(Problem(check="compute", hosts=(hosts[rank],), ranks=(rank,), message=message, cure=cure))
    right = majority({str(rank): one["result"] for rank, one in products.items()})
    wrong = [rank for rank, one in products.items() if one["result"] != right]
    for rank in wrong:
        message = f"{named([rank], hosts)} computes another product of integers than {len(products) - len(wrong)} other ranks"
        cure = "remove the device: it computes wrong results silently (run `dcgmi diag -r 3` there)"
        problems.append(Problem(check="compute", hosts=(hosts[rank],), ranks=(rank,), message=message, cure=cure))
    return problems


def merge_groups(collectives: Mapping[int, Sequence[Mapping[str, Any]]]) -> list[GroupResult]:
    """Return one GroupResult a collective and group, in order of kind and ranks. collectives: rank -> `collective_facts`."""
    seen: dict[tuple, dict[int, Mapping[str, Any]]] = {}
    for rank, measurements in collectives.items():
        for one in measurements:
            seen.setdefault((one["kind"], one["operation"], tuple(one["ranks"])), {})[rank] = one
    return [
        GroupResult(
            kind=kind,
            operation=operation,
            ranks=ranks,
            bus_bytes_per_second=min(one["bus_bytes_per_second"] for one in by_rank.values()),
            wrong={rank: one["wrong"] for rank, one in by_rank.items() if one["wrong"] is not None},
        )
        for (kind, operation, ranks), by_rank in seen.items()
    ]


def usual_speed(group: GroupResult, groups: Sequence[GroupResult]) -> float | None:
    """Return the median of the other groups with the same collective; None if it is the only one."""
    others = [
        one.bus_bytes_per_second
        for one in groups
        if (one.kind, one.operation) == (group.kind, group.operation) and one.ranks != group.ranks
    ]
    return statistics.median(others) if others else None


def collective_problems(groups: Sequence[GroupResult], hosts: Sequence[str], *, judge_speed: bool) -> list[Problem]:
    """Find wrong results and slow groups. judge_speed: False where ranks wait for cores rather than for links."""
    problems = []
    for kind, operation in dict.fromkeys((one.kind, one.operation) for one in groups):
        alike = [one for one in groups if (one.kind, one.operation) == (kind, operation)]
        wrong = [one for one in alike if one.wrong]
        if wrong:
            problems.append(_wrong_problem(wrong, alike, hosts))
        slow = {}
        for one in alike:
            usual = usual_speed(one, alike)
            if judge_speed and usual and one.bus_bytes_per_second < SLOW_GROUP * usual:
                slow[one.ranks] = (one, usual)
        if slow:
            worst, usual = min(slow.values(), key=lambda pair: pair[0].bus_bytes_per_second)
            guilty = culprits(
                [one.ranks for one, _ in slow.values()], [one.ranks for one in alike if one.ranks not in slow], hosts
            )
            message = (
                f"{len(slow)} of {len(alike)} {kind} groups are slow in {operation}, the slowest {named(worst.ranks, hosts)}: "
                f"{human_bytes(worst.bus_bytes_per_second)}/s, the median of the others is {human_bytes(usual)}/s"
            )
            where = f"host {', '.join(guilty)}" if guilty else "their hosts"
            cure = f"check the links of {where}: `nvidia-smi topo -m`, `ibstat`, `ethtool`; NCCL_DEBUG=INFO shows the path taken"
            problems.append(Problem(check="communication", hosts=guilty, ranks=tuple(worst.ranks), message=message, cure=cure))
    return problems


def _wrong_problem(wrong: Sequence[GroupResult], alike: Sequence[GroupResult], hosts: Sequence[str]) -> Problem:
    first = wrong[0]
    rank, words = next(iter(first.wrong.items()))
    partly = [rank for one in wrong if len(one.wrong) < len(one.ranks) for rank in one.wrong]
    guilty = tuple(dict.fromkeys(hosts[rank] for rank in partly))
    guilty = guilty or culprits([one.ranks for one in wrong], [one.ranks for one in alike if not one.wrong], hosts)
    return Problem(
        check="communication",
        hosts=guilty,
        ranks=tuple(sorted({rank for one in wrong for rank in one.wrong})),
        message=f"{first.operation} among {first.kind} ranks {span(first.ranks)} is wrong: on {named([rank], hosts)} {words}",
        cure="exclude the host; a link or a device corrupts data (NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1 show which)",
    )


def culprits(bad: Sequence[Sequence[int]], good: Sequence[Sequence[int]], hosts: Sequence[str]) -> tuple[str, ...]:
    """Return the fewest hosts that explain the bad groups and are in no good one; none where two hosts explain equally many."""
    innocent = {hosts[rank] for ranks in good for rank in ranks}
    left = [{hosts[rank] for rank in ranks} - innocent for ranks in bad]
    found: list[str] = []
    while left and good:
        counts = Counter(host for suspects in left for host in suspects).most_common(2)
        if not counts or (len(counts) == 2 and counts[0][1] == counts[1][1] and any(len(s) > 1 for s in left)):
            break
        found.append(counts[0][0])
        left = [suspects for suspects in left if counts[0][0] not in suspects]
    return tuple(found)
