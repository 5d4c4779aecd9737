"""One attempt: start the launcher, watch its ranks until all have ended, and say why they did."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from recipes.common.run_dir.heartbeat import read_beats
from tools.supervise.endings import HANG, LAUNCHER, LEFT, RANK_LOST, Ending, is_restarted, judge
from tools.supervise.hang_detector import Limits, StepTimes, last_in_line, name_culprits, patience_seconds
from tools.supervise.rank_links import RankEvent, RankLinks

POLL_SECONDS = 0.25
GRACE_SECONDS = 4.0  # after the first failure: for the other ranks' tracebacks. Then all are killed
STACKS_SECONDS = 3.0  # for stacks to come in; a stopped rank sends none
LAUNCHER_SECONDS = 2.0  # for a launcher whose ranks are gone: with 10 s of silence, all is over in 15


def say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


@dataclass
class Watch:
    """What is known of the attempt so far."""

    events: list[RankEvent] = field(default_factory=list)
    hosts: dict[str, set[int]] = field(default_factory=dict)  # host -> its ranks, also those that ended
    stacks: dict[int, str] = field(default_factory=dict)
    states: dict[int, str] = field(default_factory=dict)
    steps: StepTimes = field(default_factory=StepTimes)
    signs: tuple[float, ...] = ()  # the time in every heartbeat, by its own host's clock
    moved: float = field(default_factory=time.monotonic)  # when they changed last, by this one's
    looked: float = 0.0  # monotonic: when they were read last

    def take(self, events: Sequence[RankEvent]) -> None:
        for event in events:
            self.events.append(event)
            self.hosts.setdefault(event.host, set()).add(event.rank)
            if event.kind == "stacks":
                self.stacks[event.rank] = self.stacks.get(event.rank, "") + event.detail
            elif event.kind == "state":
                self.states[event.rank] = event.word

    def failed(self) -> bool:
        """Whether a rank ended in a way that the others cannot go on after."""
        return any(e.kind in ("lost", "silent") or (e.kind == "end" and e.word not in ("finished", "left")) for e in self.events)


def run_attempt(
    command: Sequence[str],
    environment: Mapping[str, str],
    lease: RankLinks,
    run_dir: Path,
    stacks_dir: Path,
    limits: Limits,
    stop_seconds: float,
    asked: Callable[[], int],
) -> Ending:
    """Start `command`, the launcher, in a process group of its own, and stay until it and every rank have ended.

    asked: how often this process was asked to end. Once: the ranks save and leave, within stop_seconds. Twice: at once.
    """
    watch = Watch()
    began = time.time()
    launcher = subprocess.Popen(command, env=dict(environment), stdin=subprocess.DEVNULL, start_new_session=True)
    hang: Ending | None = None
    told_to_leave = False
    deadline: float | None = None  # monotonic: when patience ends and the ranks are killed
    try:
        while True:
            watch.take(lease.poll(POLL_SECONDS))
            code, now = launcher.poll(), time.monotonic()
            if code is not None and not lease.ranks():
                break
            if asked() and not told_to_leave:
                told_to_leave, deadline = True, now + stop_seconds
                if not _all_train(lease, run_dir, began):
                    say("asked to end before the first step: there is nothing new to save")
                    break
                say(f"asked to end: the ranks save and leave, at most {stop_seconds:.0f} s")
                lease.tell("leave")
            if asked() > 1:
                deadline = now
            if (watch.failed() or code is not None) and (deadline is None or deadline > now + GRACE_SECONDS):
                # silence took its seconds already: the other hosts shall not wait on
                silent = any(event.kind == "silent" for event in watch.events)
                deadline = now if silent else now + GRACE_SECONDS
            if deadline is None and hang is None:
                hang = _look_for_hang(lease, watch, run_dir, stacks_dir, limits, began)
                deadline = now if hang else None
            if deadline is not None and now >= deadline:
                break
    finally:
        _end_all(launcher, lease, watch)
    if hang is not None:
        return hang
    ending = judge(watch.events, launcher.returncode, watch.hosts)
    if told_to_leave and is_restarted(ending.cause):
        return Ending(LEFT, f"asked to leave, and ended before it had saved: {ending.detail}")
    if ending.cause == LAUNCHER and watch.hosts:
        return Ending(RANK_LOST, f"the launcher ended with code {launcher.returncode} and left its ranks")
    return ending


def _all_train(lease: RankLinks, run_dir: Path, began: float) -> bool:
    """Whether every rank has come to its loop: before, it has nothing to save, and a request to leave would just kill it."""
    at_work = {beat.rank for beat in read_beats(run_dir, since=began) if beat.step > 0}
    return bool(at_work) and at_work >= set(lease.ranks())


def _end_all(launcher: subprocess.Popen[bytes], lease: RankLinks, watch: Watch) -> None:
    """Leave no process: ranks by their guards, on every host; the launcher and what it started here by its group."""
    lease.tell("die")
    end = time.monotonic() + LAUNCHER_SECONDS
    while time.monotonic() < end and (lease.ranks() or launcher.poll() is None):
        watch.take([event for event in lease.poll(POLL_SECONDS) if event.kind in ("stacks", "state") or not watch.failed()])
    lease.hang_up()
    if launcher.poll() is None:
        launcher.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(LAUNCHER_SECONDS)
    for pid in psutil.pids():  # the launcher is the leader of a session, and its children, whoever adopted them, are in it
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(pid) == launcher.pid:
                os.kill(pid, signal.SIGKILL)
    launcher.wait()


def _look_for_hang(
    lease: RankLinks, watch: Watch, run_dir: Path, stacks_dir: Path, limits: Limits, began: float
) -> Ending | None:
    """The ending by a hang, when the slowest rank made no progress for too long; its stacks are then in stacks_dir."""
    now = time.monotonic()
    if now - watch.looked < 1.0 + len(lease.ranks()) / 200:  # a file a rank, on a file system that others use
        return None
    watch.looked = now
    beats = read_beats(run_dir, since=began)
    watch.steps.add(beats)
    signs = tuple(beat.time for beat in beats)
    if signs != watch.signs:
        watch.signs, watch.moved = signs, now
    last = last_in_line(beats) if beats else None
    patience = patience_seconds(last.phase if last else "start", watch.steps.median(), limits)
    where = f'step {last.step}, "{last.phase}"' if last else "the start"
    silent = now - watch.moved
    if silent <= patience:
        return None
    say(f"no rank has moved for {silent:.0f} s (more than {patience:.0f} s) at {where}: asking every rank for its stacks")
    lease.tell("stacks")
    end = time.monotonic() + STACKS_SECONDS
    while time.monotonic() < end:
        watch.take(lease.poll(POLL_SECONDS))
    with contextlib.suppress(OSError):  # a full disk may be why they hang
        stacks_dir.mkdir(parents=True, exist_ok=True)
        for rank, text in watch.stacks.items():
            (stacks_dir / f"rank_{rank:05d}.txt").write_text(text)
    culprits = name_culprits(beats, watch.stacks, watch.states) if beats else {}
    hosts = tuple({beat.host for beat in beats if beat.rank in culprits})
    who = "; ".join(f"rank {beat.rank} on {beat.host}: {culprits[beat.rank]}" for beat in beats if beat.rank in culprits)
    detail = f"no progress for {silent:.0f} s at {where}; " + (
        f"did not reach the collective: {who}"
        if who
        else "every rank waits for the others: the network, or a collective's mismatch"
    )
    return Ending(HANG, f"{detail}; stacks in {stacks_dir}", hosts)
