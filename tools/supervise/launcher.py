"""Builds the launcher's command and environment for an attempt, and runs preflight with the same ones."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from recipes.common.config.json_files import read_json
from recipes.common.recipe import ROOT
from recipes.common.runtime.authenticated_link import SECRET_FILE
from recipes.common.runtime.network import free_port
from recipes.common.runtime.processes import signal_child
from recipes.common.runtime.supervisor_link import SUPERVISOR
from tools.common.console import UsageError
from tools.supervise import packed_words
from tools.supervise.hosts import is_here, master_address, write_hostfile

PACKED = "{packed}"
EXPORTS = "TRIFOLD_EXPORTS"  # names of the variables that other hosts get; set by launch/env.sh


def fill_words(words: str, folder: Path, hosts: Mapping[str, int], master: str | None) -> list[str]:
    """Return the launcher's words with {hostfile}, {hosts}, {nodes}, {master}, {port} and {force_multi} filled in.

    Each attempt gets a new port, unless MASTER_PORT is set: the previous one may still be in TIME_WAIT. Raises UsageError for a
    value that is no host or port.
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
    if not re.fullmatch(r"[0-9]{1,5}", values["{port}"]):
        raise UsageError(f"MASTER_PORT={values['{port}'][:80]!r} must be a port's number")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*|::1", values["{master}"]):  # IPv6 too
        raise UsageError(f"--master={values['{master}'][:80]!r} must be a host's name or address")
    name = re.compile("|".join(re.escape(name) for name in values))
    filled = [name.sub(lambda found: values[found[0]], word) for word in shlex.split(words)]
    return [word for word in filled if word]


def complete(launcher: Sequence[str], program: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Return the whole command: the launcher's words, then those of a program.

    Where the launcher's last word is {packed}, shells of other hosts read the command, and the program's words are packed.
    """
    if launcher[-1:] != [PACKED]:
        return [*launcher, *program]
    script = str(Path(packed_words.__file__).resolve())
    if problems := packed_words.unsafe_for_deepspeed(environment, [script, sys.executable]):
        raise UsageError("\n".join(problems))
    return [*launcher[:-1], script, packed_words.pack(os.getcwd(), program)]


def write_exports(path: Path, environment: Mapping[str, str]) -> str:
    """Write DeepSpeed's environment file for the other hosts: what launch/env.sh names, then the user's own .deepspeed_env.

    Their shells read the values between double quotes, and get them quoted for that.
    """
    names = [SUPERVISOR, SECRET_FILE, *environment.get(EXPORTS, "").split()]
    given = [(name, environment[name]) for name in names if "\n" not in environment.get(name, "\n")]
    for own in (Path.home() / ".deepspeed_env", Path(".deepspeed_env")):
        for number, line in enumerate(own.read_text().splitlines() if own.is_file() else [], start=1):
            name, equals, value = line.partition("=")
            if not equals:
                continue
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name.strip()):
                raise UsageError(f"{own}, line {number}: {name[:80]!r} is no name of a variable; write NAME=VALUE")
            given.append((name.strip(), value.strip()))
    path.write_text("".join(f"{name}={packed_words.in_double_quotes(value)}\n" for name, value in given))
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
    job = subprocess.Popen(
        complete(command, words, environment), env=dict(environment), stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        while job.poll() is None and not stop_requests():
            try:
                job.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
    finally:
        if job.poll() is None:
            signal_child(job.pid, signal.SIGTERM, group=True)
            job.wait()
    try:
        found = read_json(report)
    except (OSError, ValueError):
        return job.returncode, []  # less exact: a launcher's code may be that of another rank, or of a signal
    return found["exit_code"], found["bad_hosts"]
