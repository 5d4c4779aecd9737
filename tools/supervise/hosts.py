"""Chooses the hosts of an attempt from the hostfile, the spares, the bad hosts and the layouts that the recipe has."""

from __future__ import annotations

import ast
import os
import re
import shlex
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes.common.recipe import ROOT
from recipes.common.runtime.network import address_towards
from tools.common.console import UsageError

_PROBE_SECONDS = 20.0
IMPORTS_FROM_ABOVE = "sys.path[0] = str(Path(__file__).resolve().parents[1])"  # as the recipes write it
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}")
_SLOTS = re.compile(r"[1-9][0-9]{0,5}")


@dataclass(frozen=True)
class RecipeFacts:
    """The fields of a recipe that a start needs, read from its source: importing a recipe takes seconds."""

    name: str | None
    layouts: tuple[int, ...] | None  # numbers of ranks; None where the source does not spell them out


def read_recipe(path: Path) -> RecipeFacts:
    """Return `name` and the keys of `layouts` in the file's Recipe(...). Raises UsageError for a file that cannot run there."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise UsageError(f"{path} is not a recipe: {error}") from None
    refuse_misplaced(path, os.environ.get("PYTHONPATH", ""))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Recipe":
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            return RecipeFacts(_text(given.get("name")), _whole_keys(given.get("layouts")))
    return RecipeFacts(None, None)


def refuse_misplaced(path: Path, python_path: str) -> None:
    """Raise UsageError for a recipe that imports from the folder above its own, where nothing is. python_path: PYTHONPATH."""
    above = path.resolve().parent.parent
    folders = [above, *(Path(folder) for folder in python_path.split(os.pathsep) if folder)]
    lines = {line.strip() for line in path.read_text(encoding="utf-8").splitlines()}
    if IMPORTS_FROM_ABOVE in lines and not any((folder / "recipes" / "common").is_dir() for folder in folders):
        why = f"it imports recipes.common from the folder above its own, and {above} has none"
        raise UsageError(f"{path} cannot run where it lies: {why}; copy it into {ROOT / 'recipes'}")


def _text(node: ast.expr | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _whole_keys(node: ast.expr | None) -> tuple[int, ...] | None:
    if not isinstance(node, ast.Dict):
        return None
    keys = [key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, int)]
    return tuple(keys) if len(keys) == len(node.keys) else None


def read_hostfile(path: Path) -> dict[str, int]:
    """Return host -> ranks, in order. DeepSpeed's format: lines of `HOST slots=N`; # begins a comment."""
    hosts: dict[str, int] = {}
    problems, seen = [], set()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--hostfile {path}: {getattr(error, 'strerror', None) or 'it is not a text'}") from None
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        slots = words[1].removeprefix("slots=") if len(words) == 2 else ""
        if not _SLOTS.fullmatch(slots) or host_key(words[0]) in seen:
            problems.append(f"line {number}: {line.strip()[:80]!r} must be `HOST slots=N`, each host once")
        elif problem := host_problem(words[0]):
            problems.append(f"line {number}: {problem}")
        else:
            hosts[words[0]] = int(slots)
            seen.add(host_key(words[0]))
    if problems:
        raise UsageError(f"--hostfile {path}, " + "; ".join(problems))
    if not hosts:
        raise UsageError(f"--hostfile {path} names no host; write lines of `HOST slots=N`")
    return hosts


def host_key(name: str) -> str:
    """Return the same text for names that are one host's to DNS: letters of any case, a `.` at the end."""
    return name.lower().removesuffix(".")


def host_problem(name: str) -> str:
    """Return what is wrong with a host's name or IPv4 address, which ssh, pdsh and a shell are to take for nothing else."""
    if "@" in name:
        host = name.partition("@")[2][:80]
        return f"{name[:80]!r} names a user; write the host alone, and `Host {host}` with `User` in ~/.ssh/config"
    if not _HOST.fullmatch(name):
        what = "letters, digits, `.`, `_` and `-`, and no `.` or `-` at the beginning"
        return f"{name[:80]!r} is no host name: {what}; ports belong into ~/.ssh/config"
    return ""


def write_hostfile(path: Path, hosts: Mapping[str, int]) -> None:
    path.write_text("".join(f"{host} slots={slots}\n" for host, slots in hosts.items()))


def choose_hosts(
    hosts: Mapping[str, int], bad: Sequence[str], layouts: Sequence[int] | None, spares: int, min_hosts: int | None
) -> dict[str, int]:
    """Return the most good hosts, in order, whose ranks the recipe has a layout for; {} when there are too few.

    spares: hosts beyond what the run needs, idle until another is bad. min_hosts: the fewest to continue with (None: all but
    the spares are needed).
    """
    wanted = len(hosts) - spares
    good = [host for host in hosts if host not in bad]
    for count in range(min(wanted, len(good)), (wanted if min_hosts is None else min_hosts) - 1, -1):
        chosen = {host: hosts[host] for host in good[:count]}
        if chosen and (layouts is None or sum(chosen.values()) in layouts):
            return chosen
    return {}


def probe_hosts(hosts: Sequence[str], command: str) -> list[str]:
    """Return the hosts where `command`, with {host} filled in, does not succeed within 20 s. All are probed at once."""
    probes = {
        host: subprocess.Popen(
            [word.replace("{host}", host) for word in shlex.split(command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for host in hosts
    }
    bad = []
    for host, probe in probes.items():
        try:
            if probe.wait(_PROBE_SECONDS) != 0:
                bad.append(host)
        except subprocess.TimeoutExpired:
            probe.kill()
            probe.wait()
            bad.append(host)
    return bad


def is_here(host: str) -> bool:
    """Return whether `host` is this machine."""
    if host in ("localhost", "127.0.0.1", "::1", socket.gethostname()):
        return True
    try:
        own = address_towards(host)
        return own in {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False


def own_address(hosts: Sequence[str]) -> str:
    """Return this machine's address as `hosts` reach it; loopback when there are no others."""
    for host in hosts:
        if not is_here(host):
            try:
                return address_towards(host)
            except OSError:
                continue
    return "127.0.0.1"


def master_address(hosts: Sequence[str]) -> str:
    """Return an address of rank 0's host that all hosts reach: its name may resolve to loopback on itself."""
    first = hosts[0] if hosts else "localhost"
    if is_here(first):
        return own_address(hosts)
    try:
        return str(socket.getaddrinfo(first, None)[0][4][0])
    except OSError as error:
        raise UsageError(f"host {first}: its name does not resolve ({error}); correct the hostfile or the name service") from None
