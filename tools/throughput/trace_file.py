"""Writes traced steps in the format of ui.perfetto.dev and chrome://tracing: one track a rank, arrows for messages.

The k-th message that a rank sends to another in a step is the k-th that the other receives from it, and it counts as received
when it is waited for. Each rank's times are by its host's clock.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from recipes.common.run_dir.timing_files import read_trace
from recipes.common.runtime.step_clock import OTHER
from tools.common.console import UsageError
from tools.throughput.timings import Timings


def trace_text(run_dir: Path, timings: Timings) -> str:
    """Return the JSON text. Raises UsageError for a run without traced steps."""
    traces = read_trace(run_dir)
    if not traces:
        raise UsageError(f"{run_dir} has no traced steps: start it with --trace-steps FIRST:STOP, or use `run`")
    return json.dumps({"traceEvents": trace_events(traces, timings), "displayTimeUnit": "ms"})


def trace_events(traces: dict[int, list[dict[str, Any]]], timings: Timings) -> list[dict[str, Any]]:
    zero = min(step["began"] for steps in traces.values() for step in steps)
    events: list[dict[str, Any]] = [{"ph": "M", "pid": 0, "name": "process_name", "args": {"name": timings.run.resolve().name}}]
    sent: dict[tuple, list[float]] = defaultdict(list)
    received: dict[tuple, list[float]] = defaultdict(list)
    for rank, steps in traces.items():
        place = next((each for each in timings.ranks if each.rank == rank), None)
        if place is None:  # from an earlier start with more ranks
            continue
        name = f"rank {rank}: stage {place.stage}, data {place.data_rank}, tensor {place.tensor_rank}"
        events.append({"ph": "M", "pid": 0, "tid": rank, "name": "thread_name", "args": {"name": name}})
        events.append({"ph": "M", "pid": 0, "tid": rank, "name": "thread_sort_index", "args": {"sort_index": rank}})
        for step in steps:
            for part, comm, began, length in step["spans"]:
                start, micros = (step["began"] - zero + began) / 1e3, length / 1e3
                title = f"step {step['step']}" if part == OTHER else part if comm is None else f"{comm.op} {comm.group}"
                event = {"ph": "X", "pid": 0, "tid": rank, "name": title, "cat": part, "ts": start, "dur": micros}
                events.append(event | ({"args": comm._asdict()} if comm else {}))
                if comm is not None and comm.op == "isend":
                    sent[step["step"], rank, comm.peer].append(start)
                elif comm is not None and comm.op == "irecv":
                    received[step["step"], comm.peer, rank].append(start + micros)
    for key, starts in sent.items():
        step, source, target = key
        for number, (start, end) in enumerate(zip(starts, received.get(key, ()), strict=False)):
            flow = {"pid": 0, "name": "message", "cat": "message", "id": f"{step}/{source}-{target}/{number}"}
            events.append(flow | {"ph": "s", "tid": source, "ts": start})
            events.append(flow | {"ph": "f", "bp": "e", "tid": target, "ts": end})
    return events
