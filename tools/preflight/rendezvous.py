"""Where the ranks meet before any process group exists: one TCPStore, words under keys, and nothing that waits for ever.

Every step of a preflight is `bounded`: a hung file system or a collective that a peer never enters is reported as what it is,
by the rank that hangs in it, and rank 0 names the ranks that said nothing at all.
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

WAITING_SECONDS = 5.0  # between two words about who is missing
LONGEST_PAUSE_SECONDS = 0.1
CLOCK_ROUNDS = 5  # questions to each host's clock; the fastest answer counts


@dataclass(frozen=True, kw_only=True)
class Rank:
    """What a rank says of itself as it joins."""

    rank: int
    local_rank: int
    local_size: int  # ranks its launcher started on this host; 0 if it does not say
    node: int | None  # the launcher's number of this host
    hostname: str
    network: str  # equal for ranks that share one machine and one network namespace


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """This rank's end of the store. `limit_seconds` bounds every step."""

    rank: int
    world_size: int
    store: dist.Store
    address: tuple[str, int]
    limit_seconds: float


def this_rank(environment: Mapping[str, str]) -> Rank:
    """A rank by the variables of torchrun, DeepSpeed's launcher or srun; rank 0 of 1 without them."""

    def number(*names: str) -> int | None:
        return next((int(environment[name]) for name in names if environment.get(name, "").isdigit()), None)

    rank = number("RANK") or 0
    return Rank(
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


def enter(me: Rank, environment: Mapping[str, str], *, join_seconds: float, limit_seconds: float) -> Meeting:
    """Open the store at MASTER_ADDR:MASTER_PORT (rank 0 serves it, or torchrun's agent does) and say who this rank is.

    Raises CheckError where rank 0 cannot be reached in `join_seconds`.
    """
    world_size = int(environment.get("WORLD_SIZE", "1"))
    host, port = environment.get("MASTER_ADDR", "127.0.0.1"), int(environment.get("MASTER_PORT", "0"))
    serves = me.rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        if not serves:
            _knock(host, port, join_seconds)
        limit = timedelta(seconds=limit_seconds)
        store = dist.TCPStore(host, port, is_master=serves, wait_for_workers=False, timeout=limit)
    except (OSError, RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        reason = str(error).splitlines()[0]
        doing = "serve" if serves else f"reach rank 0 in {join_seconds:.0f} s at"
        cure = "is another job on that port?" if serves else f"from this host try `getent hosts {host}`; look at firewalls"
        raise CheckError(
            f"rank {me.rank} on host {me.hostname} cannot {doing} MASTER_ADDR={host} MASTER_PORT={port} ({reason}); {cure}; "
            "MASTER_ADDR must be an address of rank 0's host that the others see"
        ) from None
    # torchrun's store lives on when it starts the ranks again: words of the start before must not be taken for ours
    start = f"preflight {environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    meeting = Meeting(
        rank=me.rank,
        world_size=world_size,
        store=dist.PrefixStore(start, store),
        address=(host, store.port),
        limit_seconds=limit_seconds,
    )
    report(meeting, "join", asdict(me))
    return meeting


def _knock(host: str, port: int, seconds: float) -> None:
    """Until something answers there. torch would wait as well, and print its own frames."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=min(seconds, 5.0)).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def second_client(meeting: Meeting) -> dist.Store:
    """A connection of its own for the process group: one client's calls wait for each other."""
    host, port = meeting.address
    limit = timedelta(seconds=2 * meeting.limit_seconds)
    client = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit)
    return dist.PrefixStore("preflight process group", client)


def report(meeting: Meeting, step: str, value: Any) -> None:
    """Tell rank 0 what this rank found in a step."""
    meeting.store.set(f"{step}/{meeting.rank}", json.dumps(value))


def collect(
    meeting: Meeting,
    step: str,
    ranks: Iterable[int],
    seconds: float,
    waiting: Callable[[list[int]], None] = lambda missing: None,
) -> dict[int, Any]:
    """Rank 0: what `ranks` reported of a step, {rank: value}; ranks that say nothing in `seconds` are left out.

    waiting: told every few seconds who is still missing.
    """
    keys = {rank: f"{step}/{rank}" for rank in ranks}
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0 and not _there(meeting, list(keys.values()), min(left, WAITING_SECONDS)):
        if missing := [rank for rank, key in keys.items() if not meeting.store.check([key])]:
            waiting(missing)
    return {rank: json.loads(meeting.store.get(key)) for rank, key in keys.items() if meeting.store.check([key])}


def announce(meeting: Meeting, step: str, value: Any) -> None:
    """Rank 0: tell every rank."""
    meeting.store.set(step, json.dumps(value))


def hear(meeting: Meeting, step: str, seconds: float) -> Any:
    """What rank 0 announced. Raises CheckError when rank 0 is gone, silent, or behind a link that is cut."""
    deadline, pause = time.monotonic() + seconds, 0.001

    def ask() -> bytes | None:
        return meeting.store.get(step) if meeting.store.check([step]) else None

    reason = f"it said nothing in {seconds:.0f} s"
    while time.monotonic() < deadline:
        # the store waits for ever for an answer that a cut link does not bring
        answer = bounded(ask, "an answer of its store", meeting.limit_seconds)
        if answer.get("value") is not None:
            return json.loads(answer["value"])
        if "error" in answer:
            reason = answer["error"]
            break
        time.sleep(pause)
        pause = min(1.5 * pause, LONGEST_PAUSE_SECONDS)
    raise CheckError(f"rank {meeting.rank} lost rank 0 before {step!r}: {reason}; look at rank 0's output and at the link to it")


def _there(meeting: Meeting, keys: list[str], seconds: float) -> bool:
    """Rank 0: whether all keys are set in time. Asked for again and again: a wait of the store that times out prints warnings."""
    deadline, pause = time.monotonic() + seconds, 0.001
    while not meeting.store.check(keys):
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(1.5 * pause, LONGEST_PAUSE_SECONDS)
    return True


def bounded(work: Callable[[], Any], what: str, seconds: float) -> dict[str, Any]:
    """Run `work` in a thread of its own: {"value": ...}, or {"error": ...} when it raised or was not done in `seconds`."""
    found: dict[str, Any] = {}

    def run() -> None:
        try:
            found["value"] = work()
        except OSError as error:  # says itself what and where
            found["error"] = f"{type(error).__name__}: {error}"
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            words = str(error).splitlines() or [""]
            found["error"] = f"{type(error).__name__} in {Path(frame.filename).name}:{frame.lineno}: {words[0]}"

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return dict(found) or {"error": f"{what} did not end in {seconds:.0f} s"}


def host_names(joined: Mapping[int, Rank], world_size: int, given: Sequence[tuple[str, int]]) -> list[str]:
    """The host of every rank, [world_size], of ranks that never came too.

    given: (host, ranks) in order of ranks, as the launch script knows them. Without it a missing rank's host is told by its
    neighbours on the same node, or it is one of those in brackets, which are no names.
    """
    if given:
        return [host for host, count in given for _ in range(count)]
    nodes: dict[str, set[int]] = {}
    for one in joined.values():
        nodes.setdefault(one.hostname, set()).add(-1 if one.node is None else one.node)

    def name(one: Rank) -> str:
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


def clock_offsets(meeting: Meeting, leaders: Sequence[int]) -> dict[int, dict[str, float]]:
    """Rank 0: {leader: how far its clock is ahead of rank 0's and how uncertain that is, in seconds} (Cristian 1989)."""
    found = {}
    for leader in leaders:
        best = None
        for turn in range(CLOCK_ROUNDS):
            asked = time.time()
            announce(meeting, f"clock/{leader}/{turn}", None)
            told = collect(meeting, f"clock answer {turn}", [leader], meeting.limit_seconds)
            answered = time.time()
            if leader not in told:
                break
            offset, error = told[leader] - (asked + answered) / 2, (answered - asked) / 2
            if best is None or error < best["uncertainty"]:
                best = {"offset": offset, "uncertainty": error}
        if best is not None:
            found[leader] = best
    return found


def answer_clock(meeting: Meeting) -> None:
    """A leader: tell the time when asked, in its turn."""
    for turn in range(CLOCK_ROUNDS):
        hear(meeting, f"clock/{meeting.rank}/{turn}", 4 * meeting.limit_seconds)
        report(meeting, f"clock answer {turn}", time.time())
