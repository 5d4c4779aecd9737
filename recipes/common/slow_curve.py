"""Slow rises and plateaus, from the medians of blocks of steps: what no single step shows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from recipes.common.robust_window import MAD_TO_SD
from recipes.common.training_events import Event

Emit = Callable[[int, Event], None]
Serial = Callable[[], int]

BLOCK = 512  # logged steps, one median each: its noise is a 20th of a step's
BEST_BLOCKS, MEMORY_BLOCKS = 3, 200  # the best level: mean of 3 blocks in a row, among the last 200
RISE_NATS, RISE_NOISE, RISE_BLOCKS = 0.05, 6.0, 2  # over the best level: at least, in noise of a block, for blocks in a row
PLATEAU_NATS, PLATEAU_BLOCKS, BEGINNING_NATS = 0.02, 8, 5.0
SPOILT = 0.25  # share of a block inside a spike: the spike has its own event


class SlowCurve:
    """Slow rises and plateaus, from the medians of blocks."""

    def __init__(self, emit: Emit, serial: Serial) -> None:
        self._emit, self._serial = emit, serial
        self._losses, self._filled, self._first_step, self._off_before = np.empty(BLOCK), 0, 0, 0
        self._levels: list[float] = []
        self._noise = 0.0
        self._over: list[tuple[int, float]] = []  # first step and excess of the blocks in a row that are over
        self._rise: tuple[int, Event] | None = None
        self._run_began, self._beginning, self._blocks = True, math.nan, 0
        self._improved = math.inf, 0, 0  # level, step, block of the last progress
        self._told_plateau = False

    def add(self, steps: np.ndarray, losses: np.ndarray, off_points: int) -> None:
        """Points [n] in order, finite or not; off_points: inside spikes, so far."""
        while len(losses):
            if self._filled == 0:
                self._first_step, self._off_before = int(steps[0]), off_points
            n = min(BLOCK - self._filled, len(losses))
            self._losses[self._filled : self._filled + n] = losses[:n]
            self._filled += n
            if self._filled == BLOCK:
                if off_points - self._off_before <= SPOILT * BLOCK:
                    self._judge(int(steps[n - 1]))
                self._filled = 0
            steps, losses = steps[n:], losses[n:]

    def _judge(self, step: int) -> None:
        ordered = np.sort(self._losses)
        level = float(ordered[BLOCK // 2])
        if self._blocks == 0:
            self._beginning = float(np.median(self._losses[:16]))
        self._blocks += 1
        spread = MAD_TO_SD * float(np.sort(np.abs(ordered - level))[BLOCK // 2])
        self._noise = 1.25 * spread / math.sqrt(BLOCK)
        best = min((sum(self._levels[i : i + BEST_BLOCKS]) / BEST_BLOCKS for i in range(len(self._levels) - 2)), default=math.inf)
        self._levels.append(level)
        del self._levels[:-MEMORY_BLOCKS]
        excess = level - best
        least = max(RISE_NATS, RISE_NOISE * self._noise)
        if self._rise is not None:
            self._follow(step, excess, least)
        elif excess > least:
            self._over.append((self._first_step, excess))
            if len(self._over) >= RISE_BLOCKS:
                self._open(step, best)
        else:
            self._over.clear()
        self._plateau(step, level)

    def _open(self, step: int, best: float) -> None:
        onset, excess = self._over[0][0], max(over for _, over in self._over)
        self._rise = (
            self._serial(),
            Event(
                onset_step=onset,
                peak_step=step,
                end_step=None,
                delta=excess,
                kind="slow_rise",
                actionable=True,
                first_signal="loss",
                lead_steps=step - onset,
                evidence={"best_level": round(best, 4), "seen_step": step, "block_noise": round(self._noise, 5)},
            ),
        )
        self._over.clear()
        self._emit(*self._rise)

    def _follow(self, step: int, excess: float, least: float) -> None:
        """An open rise: its peak, and its end when half of what opened it is gone."""
        serial, event = self._rise
        if excess > event.delta:
            event = replace(event, delta=excess, peak_step=step, lead_steps=step - event.onset_step)
            self._rise = serial, event
        if excess < least / 2:
            self._emit(serial, replace(event, end_step=self._first_step))
            self._rise = None

    def _plateau(self, step: int, level: float) -> None:
        """No progress while the steps doubled. A log that begins below BEGINNING_NATS goes on with a run of unknown age."""
        best, since, block = self._improved
        if level < best - PLATEAU_NATS:
            self._improved, self._told_plateau = (level, step, self._blocks), False
            return
        stuck = step >= 2 * since and self._blocks - block >= PLATEAU_BLOCKS
        if stuck and not self._told_plateau and self._rise is None and self._beginning >= BEGINNING_NATS:
            self._told_plateau = True
            evidence = {"level": round(best, 4), "points": (self._blocks - block) * BLOCK}
            self._emit(self._serial(), Event(since, since, step, level - best, "plateau", False, "loss", 0, evidence))

    def end(self, step: int) -> None:
        if self._rise is not None:
            serial, event = self._rise
            self._emit(serial, replace(event, end_step=step))
            self._rise = None
