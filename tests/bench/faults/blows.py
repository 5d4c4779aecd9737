"""Deals blows to a running job from the outside: signals to its processes, and heartbeats that vanish."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import psutil

from recipes.common.run_dir.heartbeat import FOLDER as HEARTBEATS
from tests.bench.faults.plans import SIGNALS, Blow


def deal(blow: Blow, supervisor: int, continues: bool) -> list[Callable[[], None]]:
    """Send a blow's signal to its target. Returns what undoes it: a stopped process is continued, or killed in the end."""
    number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}.get(blow.what) or getattr(signal, f"SIG{blow.what}")
    undo = []
    for process in targets(blow.target, supervisor):
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)
            if blow.what == "stop":
                undo.append(lambda process=process: _end_stop(process, continues))
    assert blow.what in ("kill", "stop", *SIGNALS), blow
    return undo


def _end_stop(process: psutil.Process, continues: bool) -> None:
    with contextlib.suppress(psutil.Error):
        process.send_signal(signal.SIGCONT if continues else signal.SIGKILL)


def targets(name: str, supervisor: int) -> list[psutil.Process]:
    """Return the processes of a job by their place in its tree; none before they exist."""
    try:
        top = psutil.Process(supervisor)
        if name == "supervisor":
            return [top]
        launchers = top.children()[:1]
        if name == "launcher" or not launchers:
            return launchers
        ranks = sorted(launchers[0].children(), key=lambda process: process.pid)
        if name == "all ranks":
            return ranks
        ranks = ranks[int(name.split()[1]) :][:1]
        if name.startswith("rank"):
            return ranks
        return [child for rank in ranks for child in rank.children() if any("rank_guard" in word for word in child.cmdline())]
    except psutil.Error:
        return []


def lose_heartbeats(run_dir: Path, how: str) -> None:
    folder = run_dir / HEARTBEATS
    with contextlib.suppress(OSError):
        if how == "remove folder":
            shutil.rmtree(folder)
            return
        for path in folder.iterdir():
            if how == "remove":
                path.unlink()
            elif how == "garbage":
                path.write_bytes(b"\x00" * 100)
            else:
                os.utime(path, (1e9, 1e9))
