"""Starts supervised jobs for the fault bench by forking them from this process, which has imported everything.

The supervisor, the launcher of tests/support and the ranks are the real code in processes of their own; only the imports are
shared, and the supervisor's and the ranks' waits are shortened. A start costs a second of processor time instead of ten.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed  # noqa: F401
import pandas  # noqa: F401  with the next two: what W&B and the monitor import late
import requests  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
import wandb  # noqa: F401

import recipes.common.train  # noqa: F401
import tools.supervise.__main__ as supervisor
from recipes.common.checkpoint import saver
from recipes.common.recipe import ROOT
from recipes.common.runtime import exits, stop_signal
from tests.support import forked_launcher
from tests.support.supervised import recipe_copy
from tools.common.console import exit_code
from tools.supervise import attempt

STEPS, EVERY = 16, 4
RESTARTS = 2  # in a row without a new checkpoint
_LAUNCHER = "forked_launcher"  # the word that ForkedPopen takes for the launcher of tests/support
_TINY = """
recipe = replace(
    recipe,
    model=LlamaConfig(vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                      num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False),
    num_params=13_392,
    batch=Batch(seq_len=16, micro_seqs=1, global_seqs=2),
    layouts={1: Layout(), 2: Layout(pipeline=2) if PIPELINED else Layout(), 4: Layout(tensor=2, pipeline=2)},
    optimizer=AdamW(lr=LR, weight_decay=0.1, clip=1.0),
    schedule=Cosine(warmup_steps=2, min_lr=4e-4),
    checkpoints=Checkpoints(every_steps=EVERY, keep_last=KEEP, last_save_minutes=0.05),
)
"""


def write_recipe(folder: Path, *, pipelined: bool, lr: float, every: int = EVERY, keep: int = 2) -> Path:
    """Write a recipe of 16 steps that saves every 4: a start is most of its cost. Returns the file."""
    values = {"PIPELINED": pipelined, "LR": lr, "EVERY": every, "KEEP": keep}
    text = _TINY
    for name, value in values.items():
        text = text.replace(name, repr(value))
    return recipe_copy(folder, steps=STEPS, every=every, extra=text)


def _shorten_waits() -> None:
    """Shorten the waits of this process and of those that it forks."""
    attempt.POLL_SECONDS, attempt.GRACE_SECONDS, attempt.STACKS_SECONDS, attempt.LAUNCHER_SECONDS = 0.05, 1.0, 0.5, 1.0
    exits._SETTLE_SECONDS = 0.2
    stop_signal.GRACE_SECONDS = 5.0
    saver._FIRST_WAIT_SECONDS = 0.2


@dataclass(frozen=True)
class Prepare:
    """What is planted in a job's processes, before their work begins."""

    supervisor: Callable[[], None] = lambda: None
    rank: Callable[[int, int], None] = lambda attempt, rank: None  # attempt: from 1, of this supervisor
    closed_output: bool = False  # as `>&- 2>&-`


class ForkedPopen:
    """The part of subprocess.Popen that tools/supervise uses for its launcher, as a fork of this process."""

    def __init__(self, prepare: Prepare, number: int, command: Sequence[str], env: dict[str, str]) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            close_inherited()
            run_to_exit(lambda: _launch(prepare, number, list(command), env))

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
                raise subprocess.TimeoutExpired("launcher", timeout)
            time.sleep(0.01)
        return self.returncode

    def terminate(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)


def _launch(prepare: Prepare, number: int, command: list[str], env: dict[str, str]) -> int:
    for handled in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(handled, signal.SIG_DFL)  # as exec would have it
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = command
    run_path = forked_launcher.runpy.run_path

    def prepared(*args: Any, **options: Any) -> Any:
        prepare.rank(number, int(os.environ["RANK"]))
        return run_path(*args, **options)

    forked_launcher.runpy = SimpleNamespace(run_path=prepared)
    return forked_launcher.main()


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


def words_of(recipe: Path, ranks: int, run_dir: Path) -> list[str]:
    """Return the command line of tools/supervise, the same at every start."""
    limits = ["--hang-seconds", "12", "--long-phase-seconds", "40", "--stop-seconds", "10"]
    restarts = ["--backoff-seconds", "0.05", "--restarts", str(RESTARTS), "--continue", "--no-preflight"]
    return [*limits, *restarts, "--launcher", f"{_LAUNCHER} {ranks}", str(recipe), "--out-dir", str(run_dir)]


def start_job(recipe: Path, ranks: int, run_dir: Path, output: int, prepare: Prepare) -> int:
    """Fork a supervisor, and return its process. output: a descriptor for its stdout and stderr."""
    pid = os.fork()
    if pid:
        return pid
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
    sys.argv = ["supervise", *words_of(recipe, ranks, run_dir)]
    _shorten_waits()
    attempt.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": _popen(prepare)})
    run_to_exit(lambda: (prepare.supervisor(), exit_code(supervisor.main))[1])
    raise AssertionError


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


def _popen(prepare: Prepare) -> Callable[..., ForkedPopen]:
    numbers = itertools.count(1)

    def popen(command: Sequence[str], *, env: dict[str, str], stdin: int, start_new_session: bool) -> ForkedPopen:
        assert command[0] == _LAUNCHER and start_new_session, command
        return ForkedPopen(prepare, next(numbers), command, env)

    return popen
