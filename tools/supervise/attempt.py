"""Runs one attempt: starts the launcher, watches its ranks until all have ended, and returns why they did."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from recipes.common.run_dir.heartbeat import Beat, beat_files, read_beats
from recipes.common.runtime.processes import is_unended_child, kill_session, signal_child
from tools.common.console import printable
from tools.supervise.endings import HANG, LAUNCHER, RANK_LOST, STOPPED, Ending, is_restarted, judge
from tools.supervise.hang_detector import HangLimits, RecentSteps, find_culprits, hang_seconds, slowest_rank
from tools.supervise.rank_links import RankEvent, RankLinks

POLL_SECONDS = 0.25
GRACE_SECONDS = 4.0  # from the first failure to killing all: for the other ranks' tracebacks
STACKS_SECONDS = 3.0  # for stacks to arrive; a stopped rank sends none
LAUNCHER_SECONDS = 2.0  # for a launcher whose ranks are gone: with 10 s of silence, all is over in 15


def say(text: str) -> None:
    print(f"launch: {printable(text)}", file=sys.stderr, flush=True)


@dataclass
class Observed:
    """The state of the attempt so far."""

    events: list[RankEvent] = field(default_factory=list)
    hosts: dict[str, set[int]] = field(default_factory=dict)  # host -> its ranks, those that ended included
    stacks: dict[int, str] = field(default_factory=dict)
    states: dict[int, str] = field(default_factory=dict)
    steps: RecentSteps = field(default_factory=RecentSteps)
    before: Mapping[str, bytes] = field(default_factory=dict)  # heartbeat files of the attempt before
    beats: tuple[Beat, ...] = ()
    last_progress: float = field(default_factory=time.monotonic)  # when they changed last
    last_read: float = 0.0  # monotonic: when they were read last

    def add(self, events: Sequence[RankEvent]) -> None:
        for event in events:
            self.events.append(event)
            self.hosts.setdefault(event.host, set()).add(event.rank)
            if event.kind == "stacks":
                self.stacks[event.rank] = self.stacks.get(event.rank, "") + event.detail
            elif event.kind == "state":
                self.states[event.rank] = event.word

    def failed(self) -> bool:
        """Return whether a rank ended in a way that the others cannot continue after."""
        return any(
            e.kind in ("lost", "silent") or (e.kind == "end" and e.word not in ("finished", "stopped")) for e in self.events
        )


def run_attempt(
    command: Sequence[str],
    environment: Mapping[str, str],
    links: RankLinks,
    run_dir: Path,
    stacks_dir: Path,
    limits: HangLimits,
    stop_seconds: float,
    stop_requests: Callable[[], int],
) -> Ending:
    """Start the launcher `command` in a process group of its own; return when it and every rank have ended.

    stop_requests: returns how often this process was asked to end. Once: ranks save and exit within stop_seconds. Twice: now.
    """
    seen = Observed(before=beat_files(run_dir))
    launcher = subprocess.Popen(command, env=dict(environment), stdin=subprocess.DEVNULL, start_new_session=True)
    hang: Ending | None = None
    stopping = False
    deadline: float | None = None  # monotonic: when the ranks are killed
    try:
        while True:
            # first, so that what ranks had sent when it ended is read; reaped at the end: its session keeps its number
            ended = not is_unended_child(launcher.pid)
            seen.add(links.poll(POLL_SECONDS))
            now = time.monotonic()
            if ended and links.is_idle():
                break
            if stop_requests() and not stopping:
                stopping, deadline = True, now + stop_seconds
                if not _all_train(links, run_dir, seen):
                    say("stop requested before the first step: nothing new to save")
                    break
                say(f"stop requested: ranks save and exit within {stop_seconds:.0f} s")
                links.send("stop")
            if stop_requests() > 1:
                deadline = now
            if (seen.failed() or ended) and (deadline is None or deadline > now + GRACE_SECONDS):
                # the silence already took its seconds: the other hosts must not wait longer
                silent = any(event.kind == "silent" for event in seen.events)
                deadline = now if silent else now + GRACE_SECONDS
            if deadline is None and hang is None:
                hang = _check_hang(links, seen, run_dir, stacks_dir, limits)
                deadline = now if hang else None
            if deadline is not None and now >= deadline:
                break
    finally:
        _end_all(launcher, links, seen)
    if hang is not None:
        return hang
    ending = judge(seen.events, launcher.returncode, seen.hosts)
    if stopping and is_restarted(ending.cause):
        return Ending(STOPPED, f"stopped on request, before it had saved: {ending.detail}")
    if ending.cause == LAUNCHER and seen.hosts:
        return Ending(RANK_LOST, f"the launcher exited with code {launcher.returncode} and left its ranks behind")
    return ending


def _all_train(links: RankLinks, run_dir: Path, seen: Observed) -> bool:
    """Return whether every rank has reached the loop. Before it, nothing can be saved and the stop signal would kill the rank."""
    training = {beat.rank for beat in read_beats(run_dir, seen.before) if beat.step > 0}
    return bool(training) and training >= set(links.ranks())


def _end_all(launcher: subprocess.Popen[bytes], links: RankLinks, seen: Observed) -> None:
    """Leave no process behind: end ranks on every host by their guards, the launcher and its children here by its session."""
    links.send("die")
    end = time.monotonic() + LAUNCHER_SECONDS
    while time.monotonic() < end and (links.ranks() or is_unended_child(launcher.pid)):
        seen.add([event for event in links.poll(POLL_SECONDS) if event.kind in ("stacks", "state") or not seen.failed()])
    links.disconnect()
    if is_unended_child(launcher.pid):
        signal_child(launcher.pid, signal.SIGTERM)
        end = time.monotonic() + LAUNCHER_SECONDS
        while time.monotonic() < end and is_unended_child(launcher.pid):
            time.sleep(0.02)
    kill_session(launcher.pid)  # which holds its children, whoever adopted them
    launcher.wait()


def _check_hang(links: RankLinks, seen: Observed, run_dir: Path, stacks_dir: Path, limits: HangLimits) -> Ending | None:
    """Return an ending if no rank made progress for too long; every rank's stacks are then in stacks_dir."""
    now = time.monotonic()
    if now - seen.last_read < 1.0 + len(links.ranks()) / 200:  # one file a rank, on a file system that others use
        return None
    seen.last_read = now
    beats = read_beats(run_dir, seen.before)
    seen.steps.add(beats)
    if tuple(beats) != seen.beats:
        seen.beats, seen.last_progress = tuple(beats), now
    slowest = slowest_rank(beats) if beats else None
    limit = hang_seconds(slowest.phase if slowest else "start", seen.steps.median(), limits)
    where = f'step {slowest.step}, "{slowest.phase}"' if slowest else "the start"
    waited = now - seen.last_progress
    if waited <= limit:
        return None
    say(f"no progress for {waited:.0f} s (limit {limit:.0f} s) at {where}: collecting every rank's stacks")
    links.send("stacks")
    end = time.monotonic() + STACKS_SECONDS
    while time.monotonic() < end:
        seen.add(links.poll(POLL_SECONDS))
    with contextlib.suppress(OSError):  # a full disk may be why they hang
        stacks_dir.mkdir(parents=True, exist_ok=True)
        for rank, text in seen.stacks.items():
            (stacks_dir / f"rank_{rank:05d}.txt").write_text(text)
    return _hang_ending(beats, seen, f"no progress for {waited:.0f} s at {where}", stacks_dir)


def _hang_ending(beats: list[Beat], seen: Observed, what: str, stacks_dir: Path) -> Ending:
    culprits = find_culprits(beats, seen.stacks, seen.states) if beats else {}
    blamed = [beat for beat in beats if beat.rank in culprits]
    if blamed:
        who = "; ".join(f"rank {beat.rank} on {beat.host}: {culprits[beat.rank]}" for beat in blamed)
        why = f"did not reach the collective: {who}"
    else:
        why = "every rank waits for the others: a network fault or mismatched collectives"
    return Ending(HANG, f"{what}; {why}; stacks in {stacks_dir}", tuple({beat.host for beat in blamed}))
