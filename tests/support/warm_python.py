"""Runs Python programs for processes that others start: a stand-in for `python`, whose programs are forks of this process.

Real launchers (Slurm's, DeepSpeed's) then start ranks, and DeepSpeed's own programs, without the seconds of their imports. A fork
has the environment, folder and files of the process that asked for it (warm_client.py), and lives no longer than that does.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import transformers

from recipes.common.recipe import ROOT
from tests.support.forked_jobs import close_inherited, run_to_exit

# unbuffered, as launchers start ranks and each other; anything else is short, or tests how it starts
STAND_IN = """#!/bin/bash
[[ "$1" == -u ]] || exec {python} "$@"
exec {python} -I -S {client} {socket} "${{@:2}}"
"""


@contextlib.contextmanager
def warm_python() -> Iterator[Path]:
    """Serve, and yield the path of the stand-in."""
    with tempfile.TemporaryDirectory(prefix="trifold-python-") as folder, socket.socket(socket.AF_UNIX) as listener:
        stand_in, path = Path(folder) / "python", f"{folder}/socket"
        client = ROOT / "tests" / "support" / "warm_client.py"
        stand_in.write_text(STAND_IN.format(python=sys.executable, client=client, socket=path))
        stand_in.chmod(0o755)
        listener.bind(path)
        listener.listen()
        parent, server = os.getpid(), os.fork()
        if server == 0:
            sys.executable = str(stand_in)  # of what the forks start
            run_to_exit(lambda: _serve(listener, parent))
        try:
            yield stand_in
        finally:
            os.kill(server, signal.SIGKILL)
            os.waitpid(server, 0)


def _serve(listener: socket.socket, parent: int) -> int:
    """Fork a keeper for each client: of the program, which it forks in turn. Ends when `parent` does."""
    gc.freeze()  # as in tools/common/forked_ranks.py
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for keepers
    listener.settimeout(1.0)
    while os.getppid() == parent:
        with contextlib.suppress(TimeoutError):
            client, _ = listener.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                run_to_exit(lambda client=client: _keep(client))
            client.close()
    return 0


def _keep(client: socket.socket) -> int:
    """Run what the client wishes; pass on its signals, kill the program if the client dies, and send it the exit code."""
    length, files, *_ = socket.recv_fds(client, 8, 3)
    with client.makefile("rb", buffering=0) as stream:
        wish = b""
        while len(wish) < int.from_bytes(length, "big"):
            wish += stream.read(int.from_bytes(length, "big") - len(wish))
    program = os.fork()
    if program == 0:
        run_to_exit(lambda: _run(*json.loads(wish), files, client))
    for file in files:
        os.close(file)
    ended = os.pidfd_open(program)
    while not (ready := select.select([client, ended], [], [])[0]) or ended not in ready:
        numbers = client.recv(16)
        for number in numbers:
            os.kill(program, number)
        if not numbers:  # whoever ended the client ended its group
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program, signal.SIGKILL)
            os.kill(program, signal.SIGKILL)
            break
    code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    with contextlib.suppress(OSError):
        client.sendall(bytes([code if code >= 0 else 128 - code]))
    return 0


def _run(words: list[str], environment: dict[str, str], folder: str, files: list[int], client: socket.socket) -> int:
    os.setsid()
    _join_namespaces(client)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    close_inherited()
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)  # as exec would have it
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    transformers.logging.set_verbosity_error()
    if words[0] == "-m":
        sys.argv = words[1:]
        package = words[1].partition(".")[0]
        if (Path(folder) / package).is_dir():  # Python would look here first: for a repository's copy, say
            sys.modules[package].__path__ = [str(Path(folder) / package)]
            sys.modules.pop(words[1], None)  # one that a test has imported is the other's
        sys.modules.pop(f"{words[1]}.__main__", None)  # runpy warns of one that a test has imported
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
    return 0


def _join_namespaces(client: socket.socket) -> None:
    """Enter those of the client that are not this process's: tests/support/two_hosts.py makes some."""
    pid = int.from_bytes(client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 4), sys.byteorder)
    for kind in ("net", "uts", "mnt"):
        theirs = Path(f"/proc/{pid}/ns/{kind}")
        if not theirs.samefile(f"/proc/self/ns/{kind}"):
            with theirs.open("rb") as file:
                assert ctypes.CDLL(None).setns(file.fileno(), 0) == 0, theirs
