"""`report RUN`: shows where each millisecond of a step went on each rank: parts, communication, bubble, memory, slow ranks."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipes.common.model.decoder import PlanError
from recipes.common.runtime.step_clock import OTHER
from tools.common.console import GOOD, UsageError, human_bytes, machine_words, table
from tools.common.recipe_io import read_recipe
from tools.throughput import page, trace_file
from tools.throughput.bubble import find_balance, find_bubble
from tools.throughput.stragglers import rank_stragglers
from tools.throughput.timings import Timings, communication, read_timings

MOST_RANKS = 8  # with a column each; with more ranks a column is a stage's mean
MOST_KINDS = 14  # of communication
MOST_STRAGGLERS = 5
NAMES = {"weight_gradients": "weight gradients", "data_parallel": "data parallel", "all_ranks": "all ranks"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="a run directory; the run may be training")
    add_output_flags(parser)


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="write the traced steps for ui.perfetto.dev or chrome://tracing"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as one HTML page")


def run(flags: argparse.Namespace) -> int:
    return show(flags.run_dir, flags)


def show(run_dir: Path, flags: argparse.Namespace) -> int:
    """Print the report of `run_dir` and write the files that `flags` (of add_output_flags) name."""
    timings = read_timings(run_dir)
    facts = gather(timings)
    for path, text in (
        (flags.trace, lambda: trace_file.trace_text(run_dir, timings)),
        (flags.html, lambda: page.page_text(facts)),
    ):
        if path is not None:
            written = text()
            try:
                path.write_text(written, encoding="utf-8")
            except OSError as error:
                raise UsageError(f"{path}: {machine_words(error) or error}") from None
    print(json.dumps(facts) if flags.json else _text(facts))
    for path in filter(None, (flags.trace, flags.html)) if not flags.json else ():
        print(path)
    return GOOD


def gather(timings: Timings) -> dict[str, Any]:
    """Return all that the report shows, as JSON types. Times are milliseconds a step unless named otherwise."""
    mean = timings.mean()
    step = sum(mean.values())
    bubble = find_bubble(timings)
    return {
        "run": str(timings.run),
        "name": timings.run.resolve().name,
        "layout": {name: getattr(timings, name) for name in ("pipeline", "data", "tensor", "schedule")},
        "device": timings.device,
        "micro_batches": timings.micro_batches,
        "steps": int(timings.ranks[0].steps.sum()),
        "last_step": int(timings.ranks[0].last_steps[-1]),
        "step_ms": step,
        "named_share": 1 - mean[OTHER] / step,
        "parts": mean,
        "ranks": [
            {"rank": r.rank, "stage": r.stage, "data_rank": r.data_rank, "tensor_rank": r.tensor_rank, "host": r.host,
             "parts": r.mean(), "waiting": r.waiting(), "memory": r.memory}
            for r in timings.ranks
        ],
        "communication": communication(timings),
        "bubble": None if bubble is None else asdict(bubble),
        "balance": _balance(timings),
        "stragglers": [asdict(each) for each in rank_stragglers(timings)],
    }  # fmt: skip


def _balance(timings: Timings) -> dict[str, Any] | None:
    if timings.pipeline == 1:
        return None
    try:
        balance = find_balance(timings, read_recipe(timings.run))
    except PlanError as error:
        raise UsageError(f"{timings.run / 'recipe.json'}: {error}") from error
    return None if balance is None else asdict(balance)


def _text(facts: dict[str, Any]) -> str:
    layout = facts["layout"]
    blocks = [
        f"{facts['name']}: tensor {layout['tensor']} x pipeline {layout['pipeline']} x data {layout['data']}, "
        f"{layout['schedule']}, {facts['micro_batches']} micro batches, {facts['device']}; {facts['steps']} steps to step "
        f"{facts['last_step']}\na step {facts['step_ms']:.1f} ms; the named parts are {100 * facts['named_share']:.1f} % of it",
        _parts_table(facts),
        _communication_table(facts["communication"]),
    ]
    if facts["bubble"]:
        blocks += [_bubble_text(facts["bubble"]), _balance_text(facts["balance"])]
    blocks += [_memory_table(facts["ranks"]), _straggler_text(facts["stragglers"])]
    return "\n\n".join(filter(None, blocks))


def columns(facts: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """Return (heading, ms by part) of every rank, or of every stage's mean."""
    ranks = facts["ranks"]
    if len(ranks) <= MOST_RANKS:
        return [(f"rank {rank['rank']}", rank["parts"]) for rank in ranks]
    stages = {}
    for rank in ranks:
        stages.setdefault(rank["stage"], []).append(rank["parts"])
    return [
        (f"stage {stage}", {part: sum(each[part] for each in parts) / len(parts) for part in parts[0]})
        for stage, parts in sorted(stages.items())
    ]


def _parts_table(facts: dict[str, Any]) -> str:
    shown = columns(facts)
    rows = []
    for part, mean in facts["parts"].items():
        if any(parts[part] for _, parts in shown):
            cells = [f"{parts[part]:.1f}".rjust(7) + f"{100 * parts[part] / sum(parts.values()):6.1f} %" for _, parts in shown]
            rows.append([NAMES.get(part, part), f"{100 * mean / facts['step_ms']:5.1f} %", *cells])
    totals = [f"{sum(parts.values()):7.1f}" for _, parts in shown]
    rows.append(["step", "100.0 %", *totals])
    return table(rows, ["ms a step", "mean", *(heading for heading, _ in shown)])


def _communication_table(kinds: list[dict[str, Any]]) -> str:
    def rate(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}"

    rows = [
        [t["group"], t["op"], human_bytes(t["bytes"]), t["ranks"], f"{t['calls_per_step']:.1f}", f"{t['ms_per_step']:.2f}",
         f"{t['mean_us']:.0f}", rate(t["algorithm_gb_s"]), rate(t["bus_gb_s"]), rate(t["best_bus_gb_s"])]
        for t in kinds[:MOST_KINDS]
    ]  # fmt: skip
    header = ["group", "operation", "size", "ranks", "calls", "ms a step", "mean us", "alg GB/s", "bus GB/s", "fastest"]
    more = f"\nand {len(kinds) - MOST_KINDS} kinds more (--json has them)" if len(kinds) > MOST_KINDS else ""
    return f"communication of a rank (times include waiting for others)\n{table(rows, header)}{more}" if rows else ""


def _layers_text(runs: list[tuple[int, int]]) -> str:
    return " and ".join(f"{start}-{stop - 1}" for start, stop in runs)


def _bubble_text(bubble: dict[str, float]) -> str:
    percent = {name: f"{100 * value:+.1f} %" for name, value in bubble.items()}
    return (
        f"bubble {100 * bubble['measured']:.1f} % of the passes' time; by formula {100 * bubble['formula']:.1f} %, "
        f"unequal stages {percent['imbalance']}, exposed messages {percent['exposed_p2p']}, "
        f"warm-up and uneven passes {percent['warm_up']}"
    )


def _balance_text(balance: dict[str, Any]) -> str:
    def layers(stages: list[list[tuple[int, int]]]) -> str:
        return " | ".join(map(_layers_text, stages))

    ms = ", ".join(f"{value:.2f}" for value in balance["stage_ms"])
    text = f"stages take {ms} ms a micro batch, the slowest {100 * balance['imbalance']:.1f} % above the mean"
    text += f"\nlayers {layers(balance['partition'])}"
    if balance["better_partition"] == balance["partition"]:
        return text + ": no better partition"
    better = f"{layers(balance['better_partition'])}, Layout({balance['better_field']}),"
    return f"{text}; {better} would save {100 * balance['saved_share']:.1f} % of the step"


def _memory_table(ranks: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for rank in ranks for name in rank["memory"]))
    known = (rank for rank in ranks if rank["memory"])
    largest = sorted(known, key=lambda rank: -rank["memory"].get("weights", 0))[:MOST_RANKS]
    rows = [[r["rank"], r["stage"], *(human_bytes(r["memory"].get(name, 0)) for name in names)] for r in largest]
    return "memory\n" + table(rows, ["rank", "stage", *(name.replace("_", " ") for name in names)]) if rows else ""


def _straggler_text(stragglers: list[dict[str, Any]]) -> str:
    if not stragglers:
        return "slow ranks: no rank has peers that compute the same"
    rows = [
        [s["rank"], s["stage"], s["host"], f"{s['compute_ms']:.1f}", f"{100 * s['slower']:+.1f} %", f"{s['score']:.1f}",
         "SLOW" if s["called"] else "", f"{s['gain_ms']:.1f}"]
        for s in stragglers[:MOST_STRAGGLERS]
    ]  # fmt: skip
    header = ["rank", "stage", "host", "compute ms", "vs peers", "score", "", "gain ms"]
    return f"slow ranks, by their own compute time (gain: a step, if the rank were as fast as its peers)\n{table(rows, header)}"
