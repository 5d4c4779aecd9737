"""Runs Python programs for processes that some other program starts: warm_client.py stands there for `python`.

A launcher that is no child of a test (Slurm's, for one) then starts ranks that are forks of this process, which has imported
everything. They have the client's environment, folder and files, and live no longer than it does.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import runpy
import select
import shlex
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator

import transformers

from recipes.common.recipe import ROOT
from tests.support.forked_jobs import close_inherited, run_to_exit


@contextlib.contextmanager
def warm_python() -> Iterator[str]:
    """Serve, and yield the words that take the place of `python`, for a shell."""
    with tempfile.TemporaryDirectory(prefix="trifold-python-") as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/socket")
        listener.listen()
        server = os.fork()
        if server == 0:
            run_to_exit(lambda: _serve(listener))
        try:
            yield shlex.join([sys.executable, "-I", "-S", str(ROOT / "tests/support/warm_client.py"), f"{folder}/socket"])
        finally:
            os.kill(server, signal.SIGKILL)
            os.waitpid(server, 0)


def _serve(listener: socket.socket) -> int:
    """Fork a keeper for each client: of the program, which it forks in turn."""
    gc.freeze()  # as in tools/common/forked_ranks.py
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for keepers
    while True:
        client, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            run_to_exit(lambda client=client: _keep(client))
        client.close()


def _keep(client: socket.socket) -> int:
    """Run what the client wishes; pass on its signals, kill the program if the client dies, and send it the exit code."""
    length, files, *_ = socket.recv_fds(client, 8, 3)
    with client.makefile("rb", buffering=0) as stream:
        wish = b""
        while len(wish) < int.from_bytes(length, "big"):
            wish += stream.read(int.from_bytes(length, "big") - len(wish))
    program = os.fork()
    if program == 0:
        run_to_exit(lambda: _run(*json.loads(wish), files))
    for file in files:
        os.close(file)
    ended = os.pidfd_open(program)
    while not (ready := select.select([client, ended], [], [])[0]) or ended not in ready:
        numbers = client.recv(16)
        for number in numbers or [signal.SIGKILL]:
            os.kill(program, number)
        if not numbers:
            break
    code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    with contextlib.suppress(OSError):
        client.sendall(bytes([code if code >= 0 else 128 - code]))
    return 0


def _run(words: list[str], environment: dict[str, str], folder: str, files: list[int]) -> int:
    os.setsid()
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
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
    return 0
