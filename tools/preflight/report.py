"""The report of a preflight: one JSON object for programs, one table for people with the slowest ranks first."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from recipes.common.config.json_files import write_json
from recipes.common.config.placement import coordinates
from recipes.common.recipe import Layout
from tools.common.console import FAILED, GOOD, human_bytes, table
from tools.preflight.judge_ranks import GroupResult, usual_speed
from tools.preflight.problems import Problem

ROWS = 24  # of the table, at most; --json has all
KINDS = ("tensor", "pipeline", "data")


@dataclass(frozen=True, kw_only=True)
class RankRow:
    """One rank. Speeds are None where not measured; `share` is the worst of them relative to the median of its kind."""

    rank: int
    host: str
    placement: str
    share: float | None
    flops_per_second: float | None
    bus_bytes_per_second: dict[str, float | None] = field(default_factory=dict)  # by kind, of its groups' all_reduce or send_recv
    write_bytes_per_second: float | None = None
    clock_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class PreflightReport:
    recipe: str
    world_size: int
    hosts: tuple[str, ...]  # in order of their ranks
    exit_code: int
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()  # what was not checked, and why; clocks that differ
    layout: Layout | None = None
    recipe_hash: str | None = None
    rows: tuple[RankRow, ...] = ()
    groups: tuple[GroupResult, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)  # by step

    @property
    def bad_hosts(self) -> list[str]:
        return list(dict.fromkeys(host for problem in self.problems for host in problem.hosts))

    def as_json(self) -> dict[str, Any]:
        content = {"passed": self.exit_code == GOOD, "exit_code": self.exit_code, "bad_hosts": self.bad_hosts}
        return content | {name: value for name, value in asdict(self).items() if name not in content}


def with_exit_code(report: PreflightReport) -> PreflightReport:
    """Return the report with the exit code that follows from its problems."""
    return replace(report, exit_code=FAILED if report.problems else GOOD)


def write_report(report: PreflightReport, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, json.loads(json.dumps(report.as_json())))


def rank_rows(
    hosts: Sequence[str],
    layout: Layout,
    *,
    products: Mapping[int, Mapping[str, Any]],
    groups: Sequence[GroupResult],
    storage: Mapping[str, Mapping[str, Any]],
    clocks: Mapping[str, Mapping[str, float]],
) -> tuple[RankRow, ...]:
    """Return one row a rank, the slowest first."""
    flops = {rank: one["flops_per_second"] for rank, one in products.items()}
    usual_flops = _median(list(flops.values()))
    writes = {host: one["write_bytes_per_second"] for host, one in storage.items() if one.get("write_bytes_per_second")}
    usual_write = _median(list(writes.values()))
    usual = {(one.kind, one.operation, one.ranks): usual_speed(one, groups) for one in groups}
    rows = []
    for rank, host in enumerate(hosts):
        place = coordinates(rank, len(hosts), layout)
        own = [one for one in groups if rank in one.ranks]
        shares = [one.bus_bytes_per_second / u for one in own if (u := usual[one.kind, one.operation, one.ranks])]
        shares += [flops[rank] / usual_flops] if rank in flops and usual_flops else []
        shares += [writes[host] / usual_write] if host in writes and usual_write else []
        speeds = {}
        for kind in KINDS:
            passing = [one.bus_bytes_per_second for one in own if one.kind == kind and one.operation != "all_gather"]
            speeds[kind] = min(passing, default=None)
        rows.append(
            RankRow(
                rank=rank,
                host=host,
                placement=f"t{place.tensor_rank} p{place.pipeline_rank} d{place.data_rank}",
                share=min(shares, default=None),
                flops_per_second=flops.get(rank),
                bus_bytes_per_second=speeds,
                write_bytes_per_second=writes.get(host),
                clock_seconds=clocks[host]["offset"] if host in clocks else None,
            )
        )
    return tuple(sorted(rows, key=lambda row: -1.0 if row.share is None else row.share))


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def as_text(report: PreflightReport) -> str:
    """Format the table, the notes and the problems with their cures."""
    layout = report.layout
    sizes = ""
    if layout is not None:
        data = report.world_size // (layout.tensor * layout.pipeline)
        sizes = f", tensor {layout.tensor} x pipeline {layout.pipeline} x data {data}"
    ranks, hosts = report.world_size, len(report.hosts)
    where = f" on {hosts} host{'s' * (hosts != 1)}" if hosts else ""
    lines = [f"{report.recipe}: {ranks} rank{'s' * (ranks != 1)}{where}{sizes}"]
    if report.rows:
        shown = report.rows[:ROWS]
        kinds = [kind for kind in KINDS if any(row.bus_bytes_per_second.get(kind) for row in report.rows)]
        header = ["rank", "host", "placement", "of median", "product", *kinds, "write", "clock"]
        lines.append(table([_cells(row, kinds) for row in shown], header))
        if len(report.rows) > len(shown):
            lines.append(f"... and {len(report.rows) - len(shown)} faster ranks (--json has all)")
    lines += [f"note: {note}" for note in report.notes]
    if report.seconds:
        steps = ", ".join(f"{step} {seconds:.1f}" for step, seconds in report.seconds.items())
        lines.append(f"{sum(report.seconds.values()):.1f} s: {steps}")
    if not report.problems:
        return "\n".join([*lines, "passed"])
    count = len(report.problems)
    lines.append(f"FAILED, {count} problem{'s' * (count > 1)}:")
    lines += [f"  - {problem}" for problem in report.problems]
    if report.bad_hosts:
        lines.append(f"bad hosts: {', '.join(report.bad_hosts)}")
    return "\n".join(lines)


def _cells(row: RankRow, kinds: Sequence[str]) -> list[object]:
    flops, clock = row.flops_per_second, row.clock_seconds
    return [
        row.rank,
        row.host,
        row.placement,
        "-" if row.share is None else f"{row.share:.0%}",
        "-" if flops is None else f"{flops / 1e12:.1f} TFLOP/s" if flops > 1e12 else f"{flops / 1e9:.1f} GFLOP/s",
        *(_speed(row.bus_bytes_per_second.get(kind)) for kind in kinds),
        _speed(row.write_bytes_per_second),
        "-" if clock is None else f"{1000 * clock:+.1f} ms",
    ]


def _speed(value: float | None) -> str:
    return "-" if value is None else f"{human_bytes(value)}/s"
