"""Starts supervised jobs by forking them from this process, which has imported everything.

The supervisor and the ranks are the real code in processes of their own, and so is the launcher between them, which is of this
file; only the imports are shared. A start costs a second of processor time instead of ten.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import deepspeed.module_inject.auto_ep_layer  # noqa: F401  with those below: what a rank would import late
import requests  # noqa: F401  by W&B
import torch.utils.tensorboard  # noqa: F401
import transformers
import transformers.models.llama.modeling_llama
import wandb  # noqa: F401

import recipes.common.train  # noqa: F401
import tools.supervise.__main__ as supervisor
from recipes.common.recipe import ROOT
from recipes.common.runtime.network import free_port
from tools.common.console import exit_code
from tools.supervise import attempt

LAUNCHER = "forked"  # the word of --launcher that stands for `_launch`


@dataclass(frozen=True)
class Prepare:
    """What is planted in a job's processes, before their work begins."""

    supervisor: Callable[[], None] = lambda: None
    rank: Callable[[int, int], None] = lambda attempt, rank: None  # attempt: from 1, of this supervisor
    closed_output: bool = False  # as `>&- 2>&-`


class ForkedProcess:
    """The part of subprocess.Popen that tools/supervise uses for its launcher, and tests for the supervisor."""

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start_job(words: Sequence[str], output: int, prepare: Prepare = Prepare()) -> ForkedProcess:
    """Fork a supervisor. words: its command line. output: a descriptor for its stdout and stderr."""
    pid = os.fork()
    if pid:
        return ForkedProcess(pid)
    gc.freeze()  # as in tools/common/forked_ranks.py
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    close_inherited()
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
    if prepare.closed_output:
        os.close(1)
        os.close(2)
        sys.stdout = sys.stderr = None
    os.chdir(ROOT)
    sys.argv = ["supervise", *words]
    attempt.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": _popen(prepare)})
    run_to_exit(lambda: (prepare.supervisor(), exit_code(supervisor.main))[1])
    raise AssertionError


def _popen(prepare: Prepare) -> Callable[..., ForkedProcess]:
    numbers = itertools.count(1)

    def popen(command: Sequence[str], *, env: dict[str, str], stdin: int, start_new_session: bool) -> ForkedProcess:
        assert command[0] == LAUNCHER and start_new_session, command
        number, pid = next(numbers), os.fork()
        if pid == 0:
            os.setsid()
            close_inherited()
            run_to_exit(lambda: _launch(prepare, number, list(command), env))
        return ForkedProcess(pid)

    return popen


def _launch(prepare: Prepare, number: int, command: list[str], env: dict[str, str]) -> int:
    """Fork ranks that run a recipe: LAUNCHER RANKS RECIPE [FLAGS]. RANKS: a number, or a hostfile whose slots are added up.

    Like other launchers it ends all ranks when one fails, and exits with that one's code. Killed, it ends none.
    """
    for handled in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(handled, signal.SIG_DFL)  # as exec would have it
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(env)
    _, ranks, recipe, *flags = command
    if not ranks.isdigit():
        ranks = sum(int(line.rpartition("=")[2]) for line in Path(ranks).read_text().splitlines())
    world, port = int(ranks), str(free_port())
    transformers.logging.set_verbosity_error()
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world}
            os.environ.update({name: str(value) for name, value in variables.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            sys.argv = [recipe, *flags]
            run_to_exit(lambda rank=rank: _rank(prepare, number, rank, recipe))
        children.append(child)
    while children:
        child, status = os.wait()
        if child not in children:
            continue
        children.remove(child)
        if status:
            for other in children:
                os.kill(other, signal.SIGTERM)
            return os.waitstatus_to_exitcode(status) & 255
    return 0


def _rank(prepare: Prepare, number: int, rank: int, recipe: str) -> int:
    prepare.rank(number, rank)
    runpy.run_path(recipe, run_name="__main__")
    return 0


def run_to_exit(work: Callable[[], int]) -> None:
    """Run `work` in a fork and end the process with its exit code."""
    try:
        code = work()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        with contextlib.suppress(OSError):
            traceback.print_exc()
        code = 70  # EX_SOFTWARE: a supervisor or launcher that raised
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def close_inherited() -> None:
    """Close the sockets of the process that was forked, and its ends of the pipes that stdout and stderr are.

    All else stays open: libuv, which torch's store uses, writes to numbers that it remembers from before the fork.
    """
    links = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # listdir's own
            links[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    output = {links[number] for number in (1, 2) if links.get(number, "").startswith("pipe:")}
    for number, link in links.items():
        if number > 2 and (link.startswith("socket:") or link in output):
            os.close(number)
