"""Finds problems in the facts of all hosts: code, packages, recipe, storage, data, limits, and notes skewed clocks. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from recipes.common.data.shards import MAX_OPEN_SHARDS
from recipes.common.recipe import Layout
from tools.common.console import human_bytes
from tools.preflight.problems import Problem, by_host, majority, odd_ones

CLOCK_SECONDS = 1.0  # beyond, logs of several hosts are hard to read together
SLOW_WRITE = 0.2  # of the hosts' median: all write at once, and shared storage serves them unequally
OWN_FILES = 256  # Python, libraries, logs, the store
SHM_BYTES = 1 << 30  # NCCL's transport inside a host; its documentation starts containers with --shm-size=1g
LOCKED_BYTES = 1 << 30  # InfiniBand pins what it sends; NCCL's documentation asks for no limit

Facts = Mapping[str, Mapping[str, Any]]  # host -> its facts, rank 0's host first


def host_problems(facts: Facts, layout: Layout, world_size: int, ranks_of: Mapping[str, Sequence[int]]) -> list[Problem]:
    """Return what differs between hosts or is wrong on one. facts: each host's `host_facts`."""
    problems = code_problems(facts) + package_problems(facts) + recipe_problems(facts) + data_problems(facts)
    problems += limit_problems(facts, layout, world_size, ranks_of) + network_problems(facts)
    return problems


def code_problems(facts: Facts) -> list[Problem]:
    files = {host: tuple(sorted(one["code"]["files"].items())) for host, one in facts.items()}
    commits = {host: one["code"]["commit"] for host, one in facts.items()}
    usual, usual_commit = majority(files), majority(commits)
    count = sum(value == usual for value in files.values())
    cure = f"check out {usual_commit or 'the same code'} there and revert changes (`git status`), or share one checkout"
    problems = []
    for host, own in files.items():
        if own != usual:
            other = sorted(name for name, _ in set(own) ^ set(usual))
            names = list(dict.fromkeys(other))
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            message = (
                f"host {host} (commit {_short(commits[host])}) differs from {count} of {len(files)} hosts "
                f"(commit {_short(usual_commit)}) in {', '.join(names[:3])}{more}"
            )
            problems.append(Problem(check="code", hosts=(host,), message=message, cure=cure))
        elif commits[host] != usual_commit:
            message = f"host {host} is at commit {_short(commits[host])}, the majority at {_short(usual_commit)}"
            problems.append(Problem(check="code", hosts=(host,), message=message, cure=cure))
    return problems


def _short(commit: str | None) -> str:
    return commit[:10] if commit else "unknown"


def package_problems(facts: Facts) -> list[Problem]:
    names = list(dict.fromkeys(name for one in facts.values() for name in one["versions"]))
    problems = []
    for name in names:
        values = {host: one["versions"].get(name) for host, one in facts.items()}
        cure = "use the Python of the majority there" if name == "python" else "run `pip install -r requirements.txt` there"
        problems += odd_ones("packages", name, values, cure)
    variables = list(dict.fromkeys(name for one in facts.values() for name in one["environment"]))
    for name in variables:
        values = {host: one["environment"].get(name) for host, one in facts.items()}
        problems += odd_ones("environment", name, values, "export the same value on all hosts (launch/env.sh, .deepspeed_env)")
    return problems


def recipe_problems(facts: Facts) -> list[Problem]:
    broken = {host: one["recipe_error"] for host, one in facts.items() if "recipe_error" in one}
    problems = by_host("recipe", broken, list(facts), "repair the installation there: `pip install -r requirements.txt`")
    hashes = {host: one["recipe_hash"][:19] for host, one in facts.items() if "recipe_hash" in one}
    problems += odd_ones("recipe", "the resolved recipe", hashes, "copy the recipe of the other hosts there")
    unused = {host: one["unused_gpus"] for host, one in facts.items() if one.get("unused_gpus")}
    problems += by_host("devices", unused, list(facts), "repair it, or export DS_ACCELERATOR=cpu on all hosts: no run falls back")
    devices = {host: one["device"] for host, one in facts.items() if "device" in one and host not in unused}
    return problems + odd_ones(
        "devices", "the device", devices, "set the same DS_ACCELERATOR, and check that `nvidia-smi -L` lists GPUs there"
    )


def data_problems(facts: Facts) -> list[Problem]:
    data = {host: one["data"] for host, one in facts.items() if "data" in one}
    wrong = {host: "; ".join(one["problems"]) for host, one in data.items() if one["problems"]}
    problems = by_host("data", wrong, list(facts), "mount or copy the data as on the other hosts")
    for name in dict.fromkeys(name for one in data.values() for name in one["identity"]):
        values = {host: one["identity"][name][:19] for host, one in data.items() if name in one["identity"]}
        problems += odd_ones("data", f"{name}/dataset.json", values, "copy the folder of the other hosts there")
    damaged = {host: "; ".join(one["bad_shards"]) for host, one in data.items() if one["bad_shards"]}
    return problems + by_host(
        "data",
        damaged,
        list(facts),
        "copy the shard again, or run tools.data prepare; `python -m tools.data check DIR` checks all",
    )


def limit_problems(facts: Facts, layout: Layout, world_size: int, ranks_of: Mapping[str, Sequence[int]]) -> list[Problem]:
    """Check open files, for sockets and shards, and shared and locked memory, where NCCL uses them."""
    replica = layout.tensor * layout.pipeline
    connections = 2 * (world_size + world_size // replica + replica + layout.tensor + layout.pipeline)
    files: dict[str, str] = {}
    shared: dict[str, str] = {}
    locked: dict[str, str] = {}
    for host, one in facts.items():
        has, folders = one["limits"], len(one.get("data", {}).get("identity", {})) or 1
        needed = OWN_FILES + connections + folders * MAX_OPEN_SHARDS
        if has["open_files"] < needed:
            files[host] = f"{has['open_files']} open files are allowed, {world_size} ranks need {needed}"
        if one.get("device") != "cuda":
            continue
        if len(ranks_of[host]) > 1 and has["shm_free_bytes"] is not None and has["shm_free_bytes"] < SHM_BYTES:
            shared[host] = f"{human_bytes(has['shm_free_bytes'])} free in /dev/shm, NCCL wants {human_bytes(SHM_BYTES)}"
        if has["infiniband"] and 0 <= has["locked_bytes"] < LOCKED_BYTES:
            locked[host] = f"only {human_bytes(has['locked_bytes'])} of memory may be locked, InfiniBand needs more"
    hosts = list(facts)
    return (
        by_host("limits", files, hosts, "raise it: `ulimit -n 65536` before the launch, or nofile in /etc/security/limits.conf")
        + by_host("limits", shared, hosts, "start the container with --shm-size=1g or more, or remove old files in /dev/shm")
        + by_host("limits", locked, hosts, "start the container with --ulimit memlock=-1, or set memlock in limits.conf")
    )


def network_problems(facts: Facts) -> list[Problem]:
    """Check that no host's name resolves to loopback: gloo binds to it, and other machines cannot reach it."""
    if len({one["network"] for one in facts.values()}) == 1:
        return []
    looped = {
        host: f"its name resolves to {one['address']} and GLOO_SOCKET_IFNAME is not set"
        for host, one in facts.items()
        if one.get("device") != "cuda" and not one["gloo_interface"] and (one["address"] or "127.").startswith("127.")
    }
    return by_host("network", looped, list(facts), "export GLOO_SOCKET_IFNAME=INTERFACE (`ip -br address`; launch/env.sh)")


def clock_notes(offsets: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Compare clocks with their median. offsets: host -> seconds ahead of rank 0's host, and the uncertainty.

    Notes, no problems: no clock decides anything in a run, but times in logs would mislead whoever compares them.
    """
    ahead = sorted(one["offset"] for one in offsets.values())
    half = len(ahead) // 2
    right = min(ahead[half - 1 : half + 1] if len(ahead) % 2 == 0 else ahead[half : half + 1], key=abs) if ahead else 0.0
    return [
        f"the clock of host {host} is {abs(off):.1f} s {'ahead of' if off > 0 else 'behind'} the others': training does not "
        "mind, but times in its logs are wrong (`chronyc makestep` or `timedatectl set-ntp true` there)"
        for host, one in offsets.items()
        if abs(off := one["offset"] - right) - one["uncertainty"] > CLOCK_SECONDS
    ]


def storage_problems(facts: Facts, unseen: Sequence[str], needed_bytes: int, folder: str) -> list[Problem]:
    """Check that storage is shared, writable, large and fast enough.

    facts: each host's `storage_facts`. unseen: hosts whose answer rank 0 could not read. needed_bytes: free space for this run.
    """
    hosts = list(facts)
    blind = [host for host, one in facts.items() if not one["sees_word"] or host in unseen]
    apart = dict.fromkeys(blind, f"its {folder} is not rank 0's: a file written on one is not visible on the other")
    problems = by_host(
        "shared storage", apart, hosts, "mount the shared file system there, or give an --out-dir that all hosts share"
    )
    full = {
        host: f"cannot write in {folder}: {one['write_error']}"
        for host, one in facts.items()
        if one.get("write_error") is not None
    }
    problems += by_host("storage", full, hosts, "make room, or give another --out-dir")
    tight = {
        host: f"{human_bytes(one['free_bytes'])} free at {folder}, the recipe's kept checkpoints and one being written "
        f"need {human_bytes(needed_bytes)}"
        for host, one in facts.items()
        if host not in full and host not in blind and one["free_bytes"] is not None and one["free_bytes"] < needed_bytes
    }
    problems += by_host("storage", tight, hosts, "make room, lower checkpoints.keep_last, or give another --out-dir")
    speeds = {host: one["write_bytes_per_second"] for host, one in facts.items() if one["write_bytes_per_second"]}
    usual = statistics.median(speeds.values()) if speeds else 0.0
    slow = {
        host: f"writes {human_bytes(speed)}/s to {folder}, the median of {len(speeds)} hosts is {human_bytes(usual)}/s"
        for host, speed in speeds.items()
        if speed < SLOW_WRITE * usual
    }
    return problems + by_host("storage speed", slow, hosts, "check its network link to the storage, and what else writes there")
