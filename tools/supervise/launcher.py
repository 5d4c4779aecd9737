"""Builds the launcher's command and environment for an attempt, and runs preflight with the same ones."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from recipes.common.recipe import ROOT
from recipes.common.runtime.authenticated_link import SECRET_FILE
from recipes.common.runtime.network import free_port
from recipes.common.runtime.supervisor_link import SUPERVISOR
from tools.supervise.hosts import is_here, master_address, write_hostfile

EXPORTS = "TRIFOLD_EXPORTS"  # names of the variables that other hosts get; set by launch/env.sh


def fill_words(words: str, folder: Path, hosts: Mapping[str, int], master: str | None) -> list[str]:
    """Return the launcher's words with {hostfile}, {hosts}, {nodes}, {master}, {port} and {force_multi} filled in.

    Each attempt gets a new port, unless MASTER_PORT is set: the previous one may still be in TIME_WAIT.
    """
    hostfile = folder / "hostfile"
    write_hostfile(hostfile, hosts)
    alone = len(hosts) == 1 and is_here(next(iter(hosts)))
    values = {
        "{hostfile}": str(hostfile),
        "{hosts}": ",".join(hosts),
        "{nodes}": str(len(hosts)),
        "{master}": master or master_address(list(hosts)),
        "{port}": os.environ.get("MASTER_PORT") or str(free_port()),
        "{force_multi}": "" if alone else "--force_multi",  # else DeepSpeed takes a single host for this one
    }
    filled = []
    for word in shlex.split(words):
        for name, value in values.items():
            word = word.replace(name, value)
        filled += [word] if word else []
    return filled


def write_exports(path: Path, environment: Mapping[str, str]) -> str:
    """Write DeepSpeed's environment file for the other hosts: what launch/env.sh names, then the user's own .deepspeed_env."""
    names = [SUPERVISOR, SECRET_FILE, *environment.get(EXPORTS, "").split()]
    lines = [f"{name}={environment[name]}\n" for name in names if "\n" not in environment.get(name, "\n")]
    for own in (Path.home() / ".deepspeed_env", Path(".deepspeed_env")):
        if own.is_file():
            lines += [f"{line}\n" for line in own.read_text().splitlines() if "=" in line]
    path.write_text("".join(lines))
    return str(path)


@contextlib.contextmanager
def secret_file(folder: Path, secret: str) -> Iterator[str]:
    """Write the job's secret to a new file of mode 0600 in `folder`, which all hosts share; remove it at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("secret_*.txt"):  # by a supervisor that was killed
        left.unlink(missing_ok=True)
    descriptor, name = tempfile.mkstemp(prefix="secret_", suffix=".txt", dir=folder)  # O_EXCL, 0600
    try:
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(secret + "\n")
        yield name
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)


def run_preflight(
    command: list[str],
    environment: Mapping[str, str],
    recipe: str,
    run_dir: Path,
    hosts: Mapping[str, int],
    stop_requests: Callable[[], int],
) -> tuple[int, list[str]]:
    """Run tools/preflight on every host through the launcher. Returns (its exit code, the hosts that it blames)."""
    report = run_dir / "logs" / "preflight.json"  # rank 0 writes it, and may be on another host
    report.unlink(missing_ok=True)
    words = [str(ROOT / "tools" / "preflight" / "__main__.py"), recipe, "--out-dir", str(run_dir), "--json-file", str(report)]
    if hosts:
        words += ["--hosts", ",".join(f"{host}:{slots}" for host, slots in hosts.items())]
    job = subprocess.Popen([*command, *words], env=dict(environment), stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        while job.poll() is None and not stop_requests():
            try:
                job.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGTERM)
            job.wait()
    try:
        found = json.loads(report.read_text())
    except (OSError, ValueError):
        return job.returncode, []  # less exact: a launcher's code may be that of another rank, or of a signal
    return found["exit_code"], found["bad_hosts"]
