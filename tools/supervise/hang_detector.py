"""When a run hangs, and who it waits for. Reads heartbeats and stacks; pure but for that."""

from __future__ import annotations

import re
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from recipes.common.run_dir.heartbeat import PHASES, Beat

# A stack whose innermost Python frame lies in one of these waits for other ranks: it reached the collective.
_WAITING = re.compile(r"/(torch/distributed|deepspeed/comm|deepspeed/runtime/pipe/p2p)[/.]|in _sum_over_ranks\b")
_LONG = ("start", "evaluate", "save", "end")  # phases with work of unknown length


@dataclass(frozen=True)
class Limits:
    """How long a phase may last. A step: `steps` median steps, but never under `floor_seconds`."""

    steps: float = 10.0
    floor_seconds: float = 120.0
    start_seconds: float = 1800.0  # from the launch to the end of the first step: imports, weights, compilation
    long_seconds: float = 1800.0  # an evaluation, a save in the way, the end


@dataclass
class StepTimes:
    """The last steps' seconds, sampled from heartbeats."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    step: int = 0

    def add(self, beats: Sequence[Beat]) -> None:
        newest = max(beats, key=lambda beat: beat.step, default=None)
        if newest is not None and newest.step > self.step and newest.step_seconds > 0:
            self.step = newest.step
            self.seconds.append(newest.step_seconds)

    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


def patience_seconds(phase: str, median_step_seconds: float | None, limits: Limits) -> float:
    """How long the job may make no progress when its slowest rank is in `phase`."""
    if median_step_seconds is None or phase == "start":
        return limits.start_seconds
    if phase in _LONG:
        return max(limits.long_seconds, limits.steps * median_step_seconds)
    return max(limits.floor_seconds, limits.steps * median_step_seconds)


def last_in_line(beats: Sequence[Beat]) -> Beat:
    """The rank that is furthest behind."""
    return min(beats, key=lambda beat: (beat.step, PHASES.index(beat.phase)))


def innermost_frames(stacks: str) -> list[str]:
    """Of a faulthandler dump: the innermost frame of the main thread, then the frames that called it."""
    main = re.split(r"^(?:Current thread|Thread) .*$", stacks, flags=re.M)[-1]  # the main thread is printed last
    return [line.strip() for line in main.splitlines() if line.strip().startswith("File ")]


def is_waiting(stacks: str) -> bool:
    """Whether a rank's main thread waits for others, by the innermost frames of its dump."""
    return any(_WAITING.search(frame) for frame in innermost_frames(stacks)[:3])


def name_culprits(beats: Sequence[Beat], stacks: Mapping[int, str], states: Mapping[int, str]) -> dict[int, str]:
    """Rank -> why it is one of those that did not reach the collective; empty when all wait there.

    states: the kernel's letter for each rank's process. The first kind of evidence that singles out ranks is taken.
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
    busy = {rank: f"it is at {(innermost_frames(text) or ['?'])[0]}" for rank, text in stacks.items() if not is_waiting(text)}
    return busy if len(busy) < len(beats) else {}
