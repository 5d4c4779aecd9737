"""Decides when a run hangs and which ranks the others wait for, from heartbeats and stack dumps. Pure."""

from __future__ import annotations

import re
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from recipes.common.run_dir.heartbeat import PHASES, Beat
from recipes.common.runtime.supervisor_link import WAITING_FRAMES, WAITING_FUNCTION

# A stack with one of these among its innermost Python frames waits for other ranks: it reached the collective.
_WAITING = re.compile(
    rf"/(torch/distributed|deepspeed/comm)[/.]|in {WAITING_FUNCTION}\b|"
    + "|".join(rf'/{re.escape(file)}", line \d+ in {function}\b' for file, function in WAITING_FRAMES)
)
_LONG_PHASES = ("start", "evaluate", "save", "end")  # their length does not follow from a step's
_INNERMOST = 3  # frames that decide
_MEDIAN_STEPS = 10.0  # without progress


@dataclass(frozen=True)
class HangLimits:
    """How long a run may make no progress: within a step, but never less than 10 median steps; in a long phase."""

    step_seconds: float = 120.0
    long_phase_seconds: float = 1800.0  # a start (imports, weights, compilation) to its first step's end, an evaluation, a save


@dataclass
class RecentSteps:
    """Durations of recent steps, sampled from heartbeats."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    step: int = 0

    def add(self, beats: Sequence[Beat]) -> None:
        newest = max(beats, key=lambda beat: beat.step, default=None)
        if newest is not None and newest.step > self.step and newest.step_seconds > 0:
            self.step = newest.step
            self.seconds.append(newest.step_seconds)

    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


def hang_seconds(phase: str, median_step_seconds: float | None, limits: HangLimits) -> float:
    """Return how long the job may make no progress while its slowest rank is in `phase`."""
    if median_step_seconds is None or phase == "start":
        return limits.long_phase_seconds
    least = limits.long_phase_seconds if phase in _LONG_PHASES else limits.step_seconds
    return max(least, _MEDIAN_STEPS * median_step_seconds)


def slowest_rank(beats: Sequence[Beat]) -> Beat:
    """Return the heartbeat of the rank that is furthest behind."""
    return min(beats, key=lambda beat: (beat.step, PHASES.index(beat.phase)))


def main_thread_frames(stacks: str) -> list[str]:
    """Return the frames of the main thread in a faulthandler dump, the innermost first."""
    main = re.split(r"^(?:Current thread|Thread) .*$", stacks, flags=re.M)[-1]  # the main thread is printed last
    return [line.strip() for line in main.splitlines() if line.strip().startswith("File ")]


def is_waiting(stacks: str) -> bool:
    """Return whether a rank's main thread waits for other ranks, judged by the innermost frames of its dump."""
    return any(_WAITING.search(frame) for frame in main_thread_frames(stacks)[:_INNERMOST])


def find_culprits(beats: Sequence[Beat], stacks: Mapping[int, str], states: Mapping[int, str]) -> dict[int, str]:
    """Return rank -> reason for the ranks that did not reach the collective; empty when all wait in it.

    states: the kernel's letter for each rank's process. The first kind of evidence that singles out ranks decides.
    """
    stopped = {beat.rank: f"its process is stopped (state {states[beat.rank]})" for beat in beats
               if states.get(beat.rank, "S") in ("T", "t", "Z", "X")}  # fmt: skip
    if stopped:
        return stopped
    in_disk = {beat.rank: "its process waits for a disk or a device (state D)" for beat in beats
               if states.get(beat.rank) == "D"}  # fmt: skip
    if in_disk:
        return in_disk
    front = max((beat.step, PHASES.index(beat.phase)) for beat in beats)
    behind = {
        beat.rank: f'it is in "{beat.phase}" of step {beat.step}'
        for beat in beats
        if (beat.step, PHASES.index(beat.phase)) < front
    }
    if behind:
        return behind
    silent = {rank: "it did not print its stacks" for rank in (beat.rank for beat in beats) if not stacks.get(rank)}
    if silent and len(silent) < len(beats):
        return silent
    busy = {rank: f"it is at {(main_thread_frames(text) or ['?'])[0]}" for rank, text in stacks.items() if not is_waiting(text)}
    return busy if len(busy) < len(beats) else {}
