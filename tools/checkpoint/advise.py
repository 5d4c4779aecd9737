"""Computes how often to save: the interval that loses the least time, from the cost of a save and how often the job fails.

A failure costs half an interval of work on average, a save costs the time that training stands still. With `stall` seconds of
standstill and `mtbf` seconds between failures, the share of time lost with interval T is about

    stall / T + T / (2 mtbf),  least at  T = sqrt(2 stall mtbf)

(J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17(9), 1974, doi 10.1145/361147.361115). The
refinement that holds when stall is not small against mtbf is

    T = sqrt(2 stall mtbf) (1 + sqrt(stall / (2 mtbf)) / 3 + stall / (18 mtbf)) - stall,  and mtbf where stall >= 2 mtbf

(J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, FGCS 22(3), 2006,
doi 10.1016/j.future.2004.11.016). An asynchronous save is written beside training, one at a time: only the copy to host memory
counts as stall, and no interval is shorter than the writing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from recipes.common.run_dir.metrics import METRICS, read_metrics
from tools.common.console import GOOD, UsageError


@dataclass(frozen=True)
class RunTimes:
    """Medians of a run, in seconds; None where the run has not recorded it."""

    save: float | None
    stall: float | None
    step: float | None


@dataclass(frozen=True)
class Advice:
    """The interval and Young's, in seconds; shares of the time; the interval in steps where a step's length is known."""

    interval: float
    young: float
    lost_to_saving: float
    lost_to_failures: float
    steps: int | None
    bound_by_writing: bool


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help="a run directory: use its measured times")
    parser.add_argument(
        "--mtbf-hours",
        type=float,
        required=True,
        metavar="H",
        help="mean time between failures of the job: a node's, over the nodes",
    )
    parser.add_argument("--save-seconds", type=float, metavar="S", help="from the start of a save to its end")
    parser.add_argument(
        "--stall-seconds", type=float, metavar="S", help="how long training stands still for a save (default: all of it)"
    )
    parser.add_argument("--step-seconds", type=float, metavar="S", help="time of a training step, to give the interval in steps")


def run(args: argparse.Namespace) -> int:
    if args.run is not None and not (args.run / METRICS).is_file():
        raise UsageError(f"{args.run} is no run directory: it has no {METRICS}")
    times = measured(args.run) if args.run is not None else RunTimes(None, None, None)
    save, stall, step = args.save_seconds or times.save, args.stall_seconds or times.stall, args.step_seconds or times.step
    if save is None:
        where = "give --save-seconds or a RUN" if args.run is None else f"{args.run} has recorded no save; give --save-seconds"
        raise UsageError(f"how long does a save take? {where}")
    given = {"--save-seconds": save, "--stall-seconds": stall, "--step-seconds": step, "--mtbf-hours": args.mtbf_hours}
    wrong = [f"{flag}={value}" for flag, value in given.items() if value is not None and not 0 < value < math.inf]
    if wrong:
        raise UsageError(f"{', '.join(wrong)}: must be over 0")
    found = advise(save, 3600 * args.mtbf_hours, stall=stall, step=step)
    if args.json:
        print(json.dumps({"save_seconds": save, "stall_seconds": stall, "step_seconds": step} | asdict(found)))
        return GOOD
    print(f"save every {found.interval / 60:.1f} minutes" + (f", or {found.steps} steps of {step:.2f} s" if found.steps else ""))
    print(f"  a save takes {save:.1f} s, training stands still for {save if stall is None else stall:.2f} s of it")
    print(f"  lost to saving {found.lost_to_saving:.2%}, to repeated work after failures {found.lost_to_failures:.2%}")
    print(f"  Daly 2006; Young 1974 gives {found.young / 60:.1f} minutes")
    if found.bound_by_writing:
        print("  no shorter, because one save must be written before the next begins")
    every = f"every_steps={found.steps}" if found.steps else f"every_minutes={found.interval / 60:.1f}"
    print(f"  in the recipe: Checkpoints({every})")
    return GOOD


def young(stall: float, mtbf: float) -> float:
    return math.sqrt(2 * stall * mtbf)


def daly(stall: float, mtbf: float) -> float:
    if stall >= 2 * mtbf:
        return mtbf
    ratio = stall / (2 * mtbf)
    return young(stall, mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall


def advise(save: float, mtbf: float, *, stall: float | None = None, step: float | None = None) -> Advice:
    """Return the best interval; all in seconds, all over 0. stall: how long a save stops training (None: all of it)."""
    stall = save if stall is None else stall
    best = daly(stall, mtbf)
    interval = max(best, save)
    steps = None if step is None else max(1, round(interval / step))
    return Advice(interval, young(stall, mtbf), stall / (stall + interval), interval / (2 * mtbf), steps, best < save)


def measured(run: Path) -> RunTimes:
    """Read a run's saves (`save_seconds`, `save_stall_seconds`) and steps (`seconds`) from its metrics."""
    values: dict[str, list[float]] = {"save_seconds": [], "save_stall_seconds": [], "seconds": []}
    try:
        for record in read_metrics(run):
            for key, found in values.items():
                if isinstance(record.get(key), int | float):
                    found.append(record[key])
    except ValueError as error:
        raise UsageError(str(error)) from None
    return RunTimes(*(statistics.median(found) if found else None for found in values.values()))
