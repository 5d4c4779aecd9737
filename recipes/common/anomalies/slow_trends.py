"""Finds slow rises, climbs and plateaus in the medians of blocks of steps, where no single step is off its curve.

PolyPythia's 14M and 70M runs lose 0.05 to 0.7 nat in this way, over hours or within 64 steps of 5 robust deviations each, and
no spike rule fires.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from itertools import islice
from statistics import fmean, median

import numpy as np

from recipes.common.anomalies.curve import LEAST_LOSS, Curve, Points
from recipes.common.anomalies.events import Event, NewEvents
from recipes.common.anomalies.robust_window import MAD_TO_SD

BLOCK = 64  # logged steps: the noise of its median is a sixth of a step's
LEVEL_BLOCKS = 24  # blocks, 1536 steps: their mean is the level
MEMORY_LEVELS = 1600  # levels, 100k steps: the best of them is what a rise is measured from
RISE_NATS, RISE_NOISE, RISE_BLOCKS = 0.05, 6.0, 3  # over the best: at least, and in noise; so many blocks in a row
CLIMB_SHARE, CLIMB_BLOCKS = 0.15, 16  # over the lowest of so many blocks, in the loss's share: no rise but a divergence
SPOILT = 0.25  # share of a block inside spikes, which are events of their own
PLATEAU_NATS, PLATEAU_BLOCKS = 0.02, 64  # less than this is no progress; a plateau is 4096 steps at least
BEGINNING_NATS = 5.0  # a log that begins lower continues a run of unknown age, whose plateaus cannot be judged


class SlowTrends:
    """Keeps the medians of the last blocks, the best level, and the rise that lasts. Points inside spikes are no trend."""

    columns = ("loss",)

    def __init__(self, curve: Curve) -> None:
        self._events = NewEvents()
        self._losses, self._filled, self._first_step, self._spoilt = np.empty(BLOCK), 0, 0, 0  # of the block that fills
        self._beginning: float | None = None
        self._blocks = 0
        self._improved = math.inf, 0, 0  # level, step and block of the last progress
        self._reported_plateau = False
        self._rise: Event | None = None
        self._last_step = 0
        self._forget()

    def add(self, points: Points) -> list[Event]:
        steps, losses, off_curve = points.steps, points.columns["loss"], points.off_curve
        starts = np.flatnonzero(points.new_level).tolist()
        for start, end in zip([0, *starts], [*starts, len(steps)], strict=True):
            if start in starts:
                self._forget()
            self._fill(steps[start:end], losses[start:end], off_curve[start:end])
        self._last_step = int(steps[-1])
        return self._events.take()

    def resumed(self, step: int) -> list[Event]:
        """Forget the blocks after `step`: they did not happen."""
        self._filled, self._over = 0, 0
        self._recent = deque((block for block in self._recent if block[0] <= step), LEVEL_BLOCKS)
        self._levels = deque((entry for entry in self._levels if entry[0] <= step), MEMORY_LEVELS)
        self._best = min((level for _, level in self._levels), default=math.inf)
        if self._improved[1] > step:
            self._improved = math.inf, 0, 0
        if self._rise is not None and self._rise.onset_step > step:
            self._end(self._last_step)
        return self._events.take()

    def finish(self) -> list[Event]:
        self._end(self._last_step)
        return self._events.take()

    def _forget(self) -> None:
        """Start a new curve, which has no best level yet."""
        self._recent: deque[tuple[int, float, float]] = deque(maxlen=LEVEL_BLOCKS)  # first step, median, spread of each block
        self._levels: deque[tuple[int, float]] = deque(maxlen=MEMORY_LEVELS)  # last step and level
        self._best = math.inf
        self._over = 0  # blocks in a row

    def _fill(self, steps: np.ndarray, losses: np.ndarray, off_curve: np.ndarray) -> None:
        """Add points [n] to the block, and judge it whenever it is full."""
        while len(losses):
            n = min(BLOCK - self._filled, len(losses))
            off_points = np.count_nonzero(off_curve[:n])
            if self._filled == 0:
                self._first_step, self._spoilt = int(steps[0]), -int(off_curve[0])  # the first point counts as on its curve
            self._losses[self._filled : self._filled + n] = losses[:n]
            self._filled, self._spoilt = self._filled + n, self._spoilt + off_points
            if self._filled == BLOCK:
                self._filled = 0
                if self._spoilt <= SPOILT * BLOCK:
                    self._judge(int(steps[n - 1]))
            steps, losses, off_curve = steps[n:], losses[n:], off_curve[n:]

    def _end(self, step: int) -> None:
        if self._rise is not None:
            self._events.append(replace(self._rise, end_step=step))
            self._rise = None

    def _judge(self, step: int) -> None:
        """Judge a full block."""
        ordered = np.sort(self._losses)
        middle = float(ordered[BLOCK // 2])
        spread = MAD_TO_SD * float(np.sort(np.abs(ordered - middle))[BLOCK // 2])
        if self._beginning is None:
            self._beginning = middle
        self._blocks += 1
        self._recent.append((self._first_step, middle, spread))
        lowest = min(middle for _, middle, _ in islice(self._recent, max(len(self._recent) - CLIMB_BLOCKS, 0), None))
        climbs = middle - lowest >= CLIMB_SHARE * max(abs(lowest), LEAST_LOSS)
        if climbs and (self._rise is None or self._rise.kind == "slow_rise"):
            self._diverge(step, lowest, middle - lowest)
        elif self._rise is not None and self._rise.kind == "diverged":
            self._follow_climb(step, middle)
        if len(self._recent) < LEVEL_BLOCKS:
            return
        level = fmean(middle for _, middle, _ in self._recent)
        noise = 1.25 * median(spread for _, _, spread in self._recent) / math.sqrt(BLOCK)
        if self._levels:
            self._judge_rise(step, level, noise)
        if len(self._levels) == MEMORY_LEVELS and self._levels[0][1] == self._best:
            self._best = min(level for _, level in islice(self._levels, 1, None))
        self._levels.append((step, level))
        self._best = min(self._best, level)
        self._judge_plateau(step, level)

    def _judge_rise(self, step: int, level: float, noise: float) -> None:
        middle = self._recent[-1][1]
        least = max(RISE_NATS, RISE_NOISE * noise)
        least_level = max(RISE_NATS, RISE_NOISE * noise / math.sqrt(LEVEL_BLOCKS))
        self._over = self._over + 1 if middle - self._best > least else 0
        newest = fmean(middle for _, middle, _ in islice(self._recent, LEVEL_BLOCKS - RISE_BLOCKS, None))
        if self._rise is not None:
            if self._rise.kind == "slow_rise":
                self._follow(step, newest - self._best)
                if max(level, newest) - self._best < RISE_NATS / 2:
                    self._end(step)
        elif self._over >= RISE_BLOCKS or level - self._best > least_level:
            first = LEVEL_BLOCKS - RISE_BLOCKS if self._over >= RISE_BLOCKS else 0
            self._open("slow_rise", first, step, self._best, newest - self._best)

    def _open(self, kind: str, first_block: int, step: int, best: float, excess: float) -> None:
        onset = self._recent[first_block][0]
        evidence = {"best_level": round(best, 4), "actionable_step": step}
        self._rise = Event(onset, step, None, excess, kind, True, "loss", step - onset, evidence, self._events.number())
        self._events.append(self._rise)

    def _diverge(self, step: int, lowest: float, excess: float) -> None:
        """Open an event for a climb, or turn the slow rise into one."""
        if self._rise is None:
            self._open("diverged", [middle for _, middle, _ in self._recent].index(lowest) + 1, step, lowest, excess)
        else:
            evidence = {**self._rise.evidence, "best_level": round(lowest, 4)}
            self._rise = replace(self._rise, kind="diverged", evidence=evidence)
            self._follow(step, excess)
            self._events.append(self._rise)

    def _follow(self, step: int, excess: float) -> None:
        if excess > self._rise.delta:
            self._rise = replace(self._rise, delta=excess, peak_step=step, lead_steps=step - self._rise.onset_step)

    def _follow_climb(self, step: int, middle: float) -> None:
        """End a divergence from which the run comes back more than halfway: it is a recovery after all."""
        excess = middle - self._rise.evidence["best_level"]
        self._follow(step, excess)
        if excess < self._rise.delta / 2:
            self._rise = replace(self._rise, kind="slow_recovery")
            self._end(step)

    def _judge_plateau(self, step: int, level: float) -> None:
        """Report no progress while the number of steps doubled, once."""
        best, since, block = self._improved
        if level < best - PLATEAU_NATS:
            self._improved, self._reported_plateau = (level, step, self._blocks), False
            return
        stuck = step >= 2 * since and self._blocks - block >= PLATEAU_BLOCKS and self._beginning >= BEGINNING_NATS
        if stuck and not self._reported_plateau and self._rise is None:
            self._reported_plateau = True
            evidence = {"level": round(best, 4), "points": (self._blocks - block) * BLOCK}
            event = Event(since, since, step, level - best, "plateau", False, "loss", 0, evidence, self._events.number())
            self._events.append(event)
