"""The form of every finding, and the comparison of hosts with their majority."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One finding. `hosts` are at fault, so a job may run without them; empty where excluding hosts does not help."""

    check: str
    hosts: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    message: str  # which host or rank, its value, the majority's value
    cure: str

    def __str__(self) -> str:
        return f"{self.check}: {self.message}; {self.cure}"


def majority(values: Mapping[str, Hashable]) -> Any:
    """Return the most common value; of equally common ones the first, which favours rank 0's host."""
    return Counter(values.values()).most_common(1)[0][0]


def odd_ones(check: str, what: str, values: Mapping[str, Hashable], cure: str) -> list[Problem]:
    """Return one problem a host whose value is not the majority's. `cure` may contain {host} and {usual}."""
    usual = majority(values) if values else None
    count = sum(value == usual for value in values.values())
    return [
        Problem(
            check=check,
            hosts=(host,),
            message=f"host {host} has {what} {value}, {count} of {len(values)} hosts have {usual}",
            cure=cure.format(host=host, usual=usual),
        )
        for host, value in values.items()
        if value != usual
    ]


def by_host(check: str, messages: Mapping[str, str], hosts: Sequence[str], cure: str) -> list[Problem]:
    """Return one problem a host with a message; a single one without hosts where every host of several has one."""
    if len(messages) == len(hosts) > 1:
        host, message = next(iter(messages.items()))
        return [Problem(check=check, message=f"all {len(hosts)} hosts; on host {host}: {message}", cure=cure)]
    return [
        Problem(check=check, hosts=(host,), message=f"host {host}: {message}", cure=cure) for host, message in messages.items()
    ]


def values_of(
    step: str, outcomes: Mapping[int, Mapping[str, Any]], expected: Sequence[int], hosts: Sequence[str], seconds: float
) -> tuple[dict[int, Any], list[Problem]]:
    """Return (the ranks' values, problems of ranks that failed or did not report). outcomes: {rank: {"value"} or {"error"}}."""
    problems = []
    silent = [rank for rank in expected if rank not in outcomes]
    if silent:
        problems.append(
            Problem(
                check=step,
                hosts=tuple(dict.fromkeys(hosts[rank] for rank in silent)),
                ranks=tuple(silent),
                message=f"{named(silent, hosts)} did not report within {seconds:.0f} s: the process ended or hangs",
                cure="read its output, and the host's kernel messages (`dmesg`) for a killed process",
            )
        )
    failed: dict[str, list[int]] = {}
    for rank in expected:
        if rank in outcomes and "error" in outcomes[rank]:
            failed.setdefault(outcomes[rank]["error"], []).append(rank)
    for error, ranks in failed.items():
        # when two ranks cannot communicate, either may be at fault
        alone = step not in ("process group", "communication") and len(ranks) < len(expected) / 2
        problems.append(
            Problem(
                check=step,
                hosts=tuple(dict.fromkeys(hosts[rank] for rank in ranks)) if alone else (),
                ranks=tuple(ranks),
                message=f"{named(ranks, hosts)}: {error}",
                cure=CURES[step],
            )
        )
    return {rank: outcomes[rank]["value"] for rank in expected if "value" in outcomes.get(rank, {})}, problems


CURES = {
    "host facts": "run `python -m tools.preflight RECIPE` alone on that host",
    "storage": "check the mount of the output folder there (`findmnt -T DIR`), and its server if it is a network file system",
    "devices": "run `nvidia-smi` there; a GPU that hangs needs a reset or another host",
    "compute": "run `nvidia-smi` there; a GPU that hangs needs a reset or another host",
    "process group": "ranks could not connect: set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface that reaches the "
    "other hosts (launch/env.sh), and open the firewall between them; NCCL_DEBUG=INFO says more",
    "communication": "first check the ranks that hang in an earlier collective than the others, and the links between them; "
    "NCCL_DEBUG=INFO shows which link",
}


def named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Format ranks in order as "ranks 8-15 on host b"."""
    spans: dict[str, list[int]] = {}
    for rank in ranks:
        spans.setdefault(hosts[rank], []).append(rank)
    return ", ".join(f"rank{'s' * (len(own) > 1)} {span(own)} on host {host}" for host, own in spans.items())


def span(ranks: Sequence[int]) -> str:
    """Format ranks in order as "0-3,8"."""
    pieces: list[list[int]] = []
    for rank in ranks:
        if pieces and rank == pieces[-1][-1] + 1:
            pieces[-1].append(rank)
        else:
            pieces.append([rank])
    return ",".join(str(piece[0]) if len(piece) == 1 else f"{piece[0]}-{piece[-1]}" for piece in pieces)
