"""Reads a run's timing files and merges them over ranks: parts of the step, communication, memory."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipes.common.config.placement import Placement, coordinates
from recipes.common.recipe import Layout
from recipes.common.run_dir.timing_files import FOLDER, RankTiming, read_timing
from recipes.common.runtime.step_clock import COMPUTE, COOL_DOWN, PARTS, PIPELINE, TENSOR, WARM_UP, CommKey
from tools.common.console import UsageError

WARM_STEPS = 2  # at the start of a run, left out of the report
BUBBLE = "bubble"
LEAST_BYTES = 1024  # smaller messages take only latency
MESSAGES = ("pipeline_warm_up", "pipeline_steady", "pipeline_cool_down")
# ring algorithms: bytes that pass each link over the bytes that CommKey counts, for n ranks (nccl-tests, PERFORMANCE.md)
BUS_FACTORS = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "all_gather_into_tensor": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "reduce_scatter_tensor": lambda n: (n - 1) / n,
    "all_to_all_single": lambda n: (n - 1) / n,
    "reduce": lambda n: 1.0,
    "broadcast": lambda n: 1.0,
}


@dataclass(frozen=True, kw_only=True)
class RankSteps:
    """One rank's rows of timing, each the mean of `steps` steps; times are milliseconds a step."""

    rank: int
    stage: int
    data_rank: int
    tensor_rank: int
    host: str
    layers: list[tuple[int, int]]  # runs, as (start, stop)
    last_steps: np.ndarray  # [rows]: the last step of each
    steps: np.ndarray  # [rows]: how many each covers
    parts: np.ndarray  # [rows, parts]: ms a step
    transfer_ms: float  # a step, of messages between stages without the waiting
    comm: list[tuple[CommKey, int, float, float]]  # calls, us in all, least us of a call
    comm_steps: int  # that these cover
    memory: dict[str, int]

    def mean(self) -> dict[str, float]:
        """Return ms a step by part, which sum to the step; the pipeline's are split into `pipeline` (messages) and `bubble`."""
        means = dict(zip(PARTS, np.average(self.parts, axis=0, weights=self.steps).tolist(), strict=True))
        messages = sum(means.pop(part) for part in MESSAGES)
        transfer = min(self.transfer_ms, messages)
        shown = {}
        for part, value in means.items():
            shown[part] = value
            if part == TENSOR:
                shown |= {"pipeline": transfer, BUBBLE: messages - transfer}
        return shown

    def waiting(self) -> dict[str, float]:
        """Return ms a step in messages between stages and waiting for them, by their place in the schedule."""
        means = np.average(self.parts, axis=0, weights=self.steps)
        return {name: float(means[PARTS.index(name)]) for name in (WARM_UP, PIPELINE, COOL_DOWN)}

    def compute(self) -> np.ndarray:
        """Return the rank's own work [rows], in ms a step."""
        return self.parts[:, [PARTS.index(part) for part in COMPUTE]].sum(axis=1)


@dataclass(frozen=True, kw_only=True)
class Timings:
    run: Path
    pipeline: int
    data: int
    tensor: int
    schedule: str
    device: str
    micro_batches: int
    ranks: list[RankSteps]

    @property
    def placement(self) -> Placement:
        return Placement(self.schedule, self.pipeline, len(self.ranks[0].layers))

    def step_ms(self) -> float:
        return float(np.mean([sum(rank.mean().values()) for rank in self.ranks]))

    def mean(self) -> dict[str, float]:
        """Return ms a step by part, the mean over ranks."""
        means = [rank.mean() for rank in self.ranks]
        return {part: float(np.mean([mean[part] for mean in means])) for part in means[0]}


def read_timings(run: Path) -> Timings:
    """Read a run's timing. Raises UsageError for a directory without usable timing."""
    if not run.is_dir():
        raise UsageError(f"{run}: no such run directory")
    try:
        found = read_timing(run)
    except FileNotFoundError as error:
        raise UsageError(f"{error}: runs write it as they train; {run} is not a run directory, or an older version's") from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    start = found[0].start
    missing = sorted(set(range(start["world"])) - {each.start["rank"] for each in found})
    if missing:
        raise UsageError(f"{run / FOLDER}: of {start['world']} ranks, {missing[:8]} have no file; copy the whole run directory")
    empty = [each.start["rank"] for each in found if not each.rows]
    if empty:
        raise UsageError(f"{run / FOLDER}: ranks {empty[:8]} have no step yet; try again once some steps have passed")
    if unknown := set(start["parts"]) - set(PARTS):
        raise UsageError(f"{run / FOLDER}: another version's parts, {sorted(unknown)}; read it with the version that wrote it")
    least = _least_by_link(found)
    layout = Layout(tensor=start["tensor"], pipeline=start["pipeline"])
    return Timings(
        run=run,
        pipeline=start["pipeline"],
        data=start["data"],
        tensor=start["tensor"],
        schedule=start["schedule"],
        device=start["device"],
        micro_batches=found[0].rows[-1][2],
        ranks=[_rank(each, layout, least) for each in found],
    )


def _rank(timing: RankTiming, layout: Layout, least: dict[tuple, float]) -> RankSteps:
    start, rank = timing.start, timing.start["rank"]
    rows = timing.rows[WARM_STEPS:] if len(timing.rows) > WARM_STEPS else timing.rows
    table = np.array(rows, dtype=float)
    parts = np.zeros((len(table), len(PARTS)))  # a version before this one may lack some
    parts[:, [PARTS.index(part) for part in start["parts"]]] = table[:, 3:] / table[:, 1:2] / 1e3
    place = coordinates(rank, start["world"], layout)
    transfer = sum(
        count * min(least[_link(rank, key)], total / count) for key, count, total, _ in timing.comms if "pipeline" in key.group
    )
    return RankSteps(
        rank=rank,
        stage=place.pipeline_rank,
        data_rank=place.data_rank,
        tensor_rank=place.tensor_rank,
        host=start["host"],
        layers=_runs(start["layers"]),
        last_steps=table[:, 0].astype(int),
        steps=table[:, 1],
        parts=parts,
        transfer_ms=transfer / max(timing.comm_steps, 1) / 1e3,
        comm=timing.comms,
        comm_steps=timing.comm_steps,
        memory=_with_workspace(timing.memory),
    )


def _runs(layers: list[Any]) -> list[tuple[int, int]]:
    """Return the runs of layers; files from before folded schedules hold a single one."""
    return [tuple(layers)] if isinstance(layers[0], int) else [tuple(run) for run in layers]


def _with_workspace(memory: dict[str, int]) -> dict[str, int]:
    """Add "workspace", on a GPU: the step's peak without the classes that were counted."""
    if "step_peak_allocated" not in memory or "activations" not in memory:
        return memory
    counted = sum(size for name, size in memory.items() if name not in ("step_peak_allocated", "reserved"))
    return memory | {"workspace": max(memory["step_peak_allocated"] - counted, 0)}


def _link(rank: int, key: CommKey) -> tuple:
    """Identify what takes the same time to transfer: a size over a link in both directions, or a collective of a size."""
    ends = tuple(sorted((rank, key.peer))) if key.peer >= 0 else ()
    return key.group, key.op, key.bytes, key.ranks, ends


def _least_by_link(found: list[RankTiming]) -> dict[tuple, float]:
    """Return the shortest time of each link in us: one in which neither end had to wait."""
    least: dict[tuple, float] = defaultdict(lambda: float("inf"))
    for timing in found:
        for key, _, _, shortest in timing.comms:
            link = _link(timing.start["rank"], key)
            least[link] = min(least[link], shortest)
    return least


def communication(timings: Timings) -> list[dict[str, float | int | str | None]]:
    """Return one row a group, operation and size, with nccl-tests' GB/s of all calls and of the fastest.

    Messages that overlap computation ("isend", "awaited") have no bandwidth, since only the wait for them is timed; nor have
    those below LEAST_BYTES.
    """
    merged: dict[tuple[str, str, int, int], list[float]] = {}
    for rank in timings.ranks:
        for key, count, total, shortest in rank.comm:
            entry = merged.setdefault(key[:4], [0.0, 0.0, float("inf")])
            entry[0] += count / rank.comm_steps
            entry[1] += total / rank.comm_steps
            entry[2] = min(entry[2], shortest)
    rows = []
    for (group, op, count_bytes, ranks), (count, total, shortest) in merged.items():
        known = op in BUS_FACTORS and ranks > 1 and count_bytes >= LEAST_BYTES
        factor = BUS_FACTORS[op](ranks) if known else None
        mean_us = total / count
        rows.append(
            {
                "group": group,
                "op": op,
                "bytes": count_bytes,
                "ranks": ranks,
                "calls_per_step": count / len(timings.ranks),
                "ms_per_step": total / 1e3 / len(timings.ranks),
                "mean_us": mean_us,
                "least_us": shortest,
                "algorithm_gb_s": None if factor is None else count_bytes / mean_us / 1e3,
                "bus_gb_s": None if factor is None else factor * count_bytes / mean_us / 1e3,
                "best_bus_gb_s": None if factor is None or not shortest else factor * count_bytes / shortest / 1e3,
            }
        )
    return sorted(rows, key=lambda row: -row["ms_per_step"])
