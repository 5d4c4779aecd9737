"""How often to save: the interval that wastes the least time, from the cost of a save and how often the job fails.

A failure costs half an interval of work on average, a save costs the time that training stands still. With `stall` seconds of
standstill and `mtbf` seconds between failures, the share of time lost with interval T is about

    stall / T + T / (2 mtbf),  least at  T = sqrt(2 stall mtbf)

(J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17(9), 1974, doi 10.1145/361147.361115). The
refinement that holds when stall is not small against mtbf is

    T = sqrt(2 stall mtbf) (1 + sqrt(stall / (2 mtbf)) / 3 + stall / (18 mtbf)) - stall,  and mtbf where stall >= 2 mtbf

(J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, FGCS 22(3), 2006,
doi 10.1016/j.future.2004.11.016). An asynchronous save is written beside training, one at a time: what counts as stall is the
copy to host memory alone, and no interval is shorter than the writing.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Measured:
    """Medians of a run, in seconds; None where the run has not recorded it."""

    save: float | None
    stall: float | None
    step: float | None


@dataclass(frozen=True)
class Advice:
    """Seconds, shares of the time, and the interval in steps where a step's length is known."""

    interval: float
    young: float
    lost_to_saving: float
    lost_to_failures: float
    steps: int | None
    bound_by_writing: bool


def young(stall: float, mtbf: float) -> float:
    return math.sqrt(2 * stall * mtbf)


def daly(stall: float, mtbf: float) -> float:
    if stall >= 2 * mtbf:
        return mtbf
    ratio = stall / (2 * mtbf)
    return young(stall, mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall


def advise(save: float, mtbf: float, *, stall: float | None = None, step: float | None = None) -> Advice:
    """All in seconds, all over 0. stall: how long training stands still for a save that takes `save` (None: all of it)."""
    stall = save if stall is None else stall
    best = daly(stall, mtbf)
    interval = max(best, save)
    steps = None if step is None else max(1, round(interval / step))
    return Advice(interval, young(stall, mtbf), stall / (stall + interval), interval / (2 * mtbf), steps, best < save)


def measured(run: Path) -> Measured:
    """What a run's metrics say of its saves (`save_seconds`, `save_stall_seconds`) and steps (`seconds`)."""
    values: dict[str, list[float]] = {"save_seconds": [], "save_stall_seconds": [], "seconds": []}
    with (run / METRICS).open(encoding="utf-8") as file:
        for line in file:
            try:
                record: dict[str, Any] = json.loads(line)
            except ValueError:
                continue  # a line cut short by a kill
            for key, found in values.items():
                if isinstance(record.get(key), int | float):
                    found.append(record[key])
    medians = [statistics.median(found) if found else None for found in values.values()]
    return Measured(*medians)
