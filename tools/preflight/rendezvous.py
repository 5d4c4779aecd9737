"""Exchanges messages between ranks before any process group exists: key-value pairs in a TCPStore; every wait has a timeout.

Every step of a preflight is `bounded`: a rank that hangs in a file system or in a collective that a peer never enters reports it
itself, and rank 0 names the ranks that did not report at all.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tools.common.console import CheckError

WAITING_SECONDS = 5.0  # between two messages about missing ranks
LONGEST_PAUSE_SECONDS = 0.1
CLOCK_ROUNDS = 5  # queries of each host's clock; the fastest answer counts


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """A rank as it reports itself when it joins."""

    rank: int
    local_rank: int
    local_size: int  # ranks started on this host; 0 if the launcher does not say
    node: int | None  # the launcher's index of this host
    hostname: str
    network: str  # equal for ranks that share one machine and one network namespace


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """This rank's connection to the store. `limit_seconds` bounds every step."""

    rank: int
    world_size: int
    store: dist.Store
    address: tuple[str, int]
    limit_seconds: float


def this_rank(environment: Mapping[str, str]) -> RankInfo:
    """Read this rank from the variables of torchrun, DeepSpeed's launcher or srun; rank 0 of 1 without them."""

    def number(*names: str) -> int | None:
        return next((int(environment[name]) for name in names if environment.get(name, "").isdigit()), None)

    rank = number("RANK") or 0
    return RankInfo(
        rank=rank,
        local_rank=number("LOCAL_RANK") or 0,
        local_size=number("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE") or 0,
        node=number("GROUP_RANK", "CROSS_RANK", "SLURM_NODEID"),
        hostname=socket.gethostname(),
        network=_network(),
    )


def _network() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/net")
    except OSError:  # not Linux
        return socket.gethostname()


def join(me: RankInfo, environment: Mapping[str, str], *, join_seconds: float, limit_seconds: float) -> Rendezvous:
    """Open the store at MASTER_ADDR:MASTER_PORT (served by rank 0 or torchrun's agent) and report this rank.

    Raises CheckError if rank 0 cannot be reached within `join_seconds`.
    """
    world_size = int(environment.get("WORLD_SIZE", "1"))
    host, port = environment.get("MASTER_ADDR", "127.0.0.1"), int(environment.get("MASTER_PORT", "0"))
    serves = me.rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        if not serves:
            _wait_for_server(host, port, join_seconds)
        limit = timedelta(seconds=limit_seconds)
        store = dist.TCPStore(host, port, is_master=serves, wait_for_workers=False, timeout=limit)
    except (OSError, RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        reason = str(error).splitlines()[0]
        doing = "serve" if serves else f"reach rank 0 within {join_seconds:.0f} s at"
        cure = "is another job on that port?" if serves else f"try `getent hosts {host}` on this host; check firewalls"
        raise CheckError(
            f"rank {me.rank} on host {me.hostname} cannot {doing} MASTER_ADDR={host} MASTER_PORT={port} ({reason}); {cure}; "
            "MASTER_ADDR must be an address of rank 0's host that the others reach"
        ) from None
    # torchrun's store outlives a restart of the ranks: do not read the previous start's messages
    start = f"preflight {environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    rendezvous = Rendezvous(
        rank=me.rank,
        world_size=world_size,
        store=dist.PrefixStore(start, store),
        address=(host, store.port),
        limit_seconds=limit_seconds,
    )
    report(rendezvous, "join", asdict(me))
    return rendezvous


def _wait_for_server(host: str, port: int, seconds: float) -> None:
    """Wait until a server answers. torch would wait too, but print its own frames."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=min(seconds, 5.0)).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def second_connection(rendezvous: Rendezvous) -> dist.Store:
    """Open another connection for the process group: one connection's calls wait for each other."""
    host, port = rendezvous.address
    limit = timedelta(seconds=2 * rendezvous.limit_seconds)
    client = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit)
    return dist.PrefixStore("preflight process group", client)


def report(rendezvous: Rendezvous, step: str, value: Any) -> None:
    """Send rank 0 this rank's result of a step."""
    rendezvous.store.set(f"{step}/{rendezvous.rank}", json.dumps(value))


def collect(
    rendezvous: Rendezvous,
    step: str,
    ranks: Iterable[int],
    seconds: float,
    waiting: Callable[[list[int]], None] = lambda missing: None,
) -> dict[int, Any]:
    """Return {rank: value} that `ranks` reported for a step, on rank 0; ranks that do not within `seconds` are missing in it.

    waiting: called every few seconds with the ranks still missing.
    """
    keys = {rank: f"{step}/{rank}" for rank in ranks}
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0 and not _all_set(rendezvous, list(keys.values()), min(left, WAITING_SECONDS)):
        if missing := [rank for rank, key in keys.items() if not rendezvous.store.check([key])]:
            waiting(missing)
    return {rank: _parsed(step, rendezvous.store.get(key)) for rank, key in keys.items() if rendezvous.store.check([key])}


def announce(rendezvous: Rendezvous, step: str, value: Any) -> None:
    """Send a value to every rank, on rank 0."""
    rendezvous.store.set(step, json.dumps(value))


def receive(rendezvous: Rendezvous, step: str, seconds: float) -> Any:
    """Return what rank 0 announced. Raises CheckError when rank 0 is gone, silent or unreachable."""
    deadline, pause = time.monotonic() + seconds, 0.001

    def ask() -> bytes | None:
        return rendezvous.store.get(step) if rendezvous.store.check([step]) else None

    reason = f"no message within {seconds:.0f} s"
    while time.monotonic() < deadline:
        # over a broken link the store would wait for ever
        answer = bounded(ask, "an answer of its store", rendezvous.limit_seconds)
        if answer.get("value") is not None:
            return _parsed(step, answer["value"])
        if "error" in answer:
            reason = answer["error"]
            break
        time.sleep(pause)
        pause = min(1.5 * pause, LONGEST_PAUSE_SECONDS)
    raise CheckError(f"rank {rendezvous.rank} lost rank 0 before {step!r}: {reason}; check rank 0's output and the link to it")


def _parsed(step: str, message: bytes) -> Any:
    try:
        return json.loads(message)
    except (ValueError, RecursionError):
        raise CheckError(
            f"a message about {step!r} in this job's store is not JSON: another program wrote it; let only the job's hosts reach "
            "MASTER_PORT (launch/README.md, Trust)"
        ) from None


def _all_set(rendezvous: Rendezvous, keys: list[str], seconds: float) -> bool:
    """Return whether all keys are set in time. Polls, since a store's wait that times out prints warnings."""
    deadline, pause = time.monotonic() + seconds, 0.001
    while not rendezvous.store.check(keys):
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(1.5 * pause, LONGEST_PAUSE_SECONDS)
    return True


def bounded(work: Callable[[], Any], what: str, seconds: float) -> dict[str, Any]:
    """Run `work` in a thread; return {"value": ...}, or {"error": ...} if it raised or took longer than `seconds`."""
    found: dict[str, Any] = {}

    def run() -> None:
        try:
            found["value"] = work()
        except OSError as error:  # its text says what and where
            found["error"] = f"{type(error).__name__}: {error}"
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            words = str(error).splitlines() or [""]
            found["error"] = f"{type(error).__name__} in {Path(frame.filename).name}:{frame.lineno}: {words[0]}"

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return dict(found) or {"error": f"{what} did not end within {seconds:.0f} s"}


def host_names(joined: Mapping[int, RankInfo], world_size: int, given: Sequence[tuple[str, int]]) -> list[str]:
    """Return the host of every rank, also of ranks that never joined, [world_size].

    given: (host, ranks) in order of ranks, as the launch script knows them. Without it, a missing rank's host is inferred from
    its neighbours on the same node, or is a placeholder in brackets.
    """
    if given:
        return [host for host, count in given for _ in range(count)]
    nodes: dict[str, set[int]] = {}
    for one in joined.values():
        nodes.setdefault(one.hostname, set()).add(-1 if one.node is None else one.node)

    def name(one: RankInfo) -> str:
        several = len(nodes[one.hostname]) > 1  # two nodes of one hostname: containers, network namespaces
        return f"{one.hostname}#{one.node}" if several else one.hostname

    size = max((one.local_size for one in joined.values()), default=0)
    by_node = {rank // size: name(one) for rank, one in joined.items()} if size else {}
    found = []
    for rank in range(world_size):
        if rank in joined:
            found.append(name(joined[rank]))
        else:
            found.append(by_node.get(rank // size, f"(node {rank // size})") if size else "(unknown)")
    return found


def clock_offsets(rendezvous: Rendezvous, leaders: Sequence[int]) -> dict[int, dict[str, float]]:
    """Return {leader: seconds that its clock is ahead of rank 0's, and their uncertainty}, on rank 0 (Cristian 1989)."""
    found = {}
    for leader in leaders:
        best = None
        for turn in range(CLOCK_ROUNDS):
            asked = time.time()
            announce(rendezvous, f"clock/{leader}/{turn}", None)
            answers = collect(rendezvous, f"clock answer {turn}", [leader], rendezvous.limit_seconds)
            answered = time.time()
            if leader not in answers:
                break
            offset, error = answers[leader] - (asked + answered) / 2, (answered - asked) / 2
            if best is None or error < best["uncertainty"]:
                best = {"offset": offset, "uncertainty": error}
        if best is not None:
            found[leader] = best
    return found


def answer_clock(rendezvous: Rendezvous) -> None:
    """Report the time whenever rank 0 asks, on a host's first rank."""
    for turn in range(CLOCK_ROUNDS):
        receive(rendezvous, f"clock/{rendezvous.rank}/{turn}", 4 * rendezvous.limit_seconds)
        report(rendezvous, f"clock answer {turn}", time.time())
