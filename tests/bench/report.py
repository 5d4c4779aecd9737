"""Measures the spikes report at a million steps: writing it, opening it, zooming and pointing in headless Chromium.

    python -m tests.bench.report [--steps 1000000] [--rounds 5] [--json]

With plotly installed, its page of the same series is measured beside it, by turns: no events, no maps, and only POINTS of each
series, the lowest and highest of every block. CPU time of the whole browser, medians.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import importlib
import importlib.util
import json
import statistics
import tempfile
import time

import numpy as np
import psutil

from recipes.common.run_dir.tensor_stats import PARAMETERS, StatsWriter
from tests.support.browser import CHROMIUM, Page, browser
from tests.support.synthetic_logs import healthy_loss, healthy_norm
from tools.common.console import GOOD, UsageError, exit_code, table
from tools.common.logs.run_numbers import read_numbers
from tools.spikes.report import PANELS, report
from tools.spikes.report_page.columns import extremes

SPIKES, LAYERS, POINTS = 25, 32, 4000
PLOTLY_READY = "requestAnimationFrame(() => requestAnimationFrame(() => {document.body.dataset.openedMs = performance.now()}))"
PLOTLY_ZOOM = "window.showSteps = (a, b) => Plotly.relayout(document.querySelector('.js-plotly-plot'), {'xaxis.range': [a, b]})"
FRAME = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
ZOOMS = ((0.1, 0.9), (0.3, 0.32), (0.48, 0.481), (0.2, 0.7), (0, 1))  # shares of the run


def make_run(folder: Path, steps: int) -> Path:
    """Write a run of healthy loss with SPIKES spikes, every column that the report draws, and statistics around each spike."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    loss, norm = healthy_loss(points=steps), healthy_norm(points=steps)
    onsets = np.linspace(0.03 * steps, 0.97 * steps, SPIKES).astype(int)
    for onset in onsets:
        after = np.arange(min(400, steps - onset))
        loss[onset : onset + 400] += 1.5 * np.exp(-after / 30)
        norm[onset : onset + 400] *= 1 + 9 * np.exp(-after / 6)
    excess, ratio, seconds = (scale * np.exp(0.1 * rng.standard_normal(steps)) for scale in (0.2, 1e-3, 1.2))
    with (folder / "metrics.jsonl").open("w") as file:
        for i, rank in enumerate(rng.integers(0, 64, steps).tolist()):
            line = {"loss": loss[i], "grad_norm": norm[i], "lr": 3e-4 * (1 - i / steps), "tokens": 4_194_304}
            line |= {"seconds": seconds[i], "loss_max": loss[i] + excess[i], "loss_max_rank": rank, "update_ratio": ratio[i]}
            if i % 2000 == 0:
                line["val_loss"] = loss[i]
            file.write(json.dumps({"step": i + 1} | {name: round(float(value), 7) for name, value in line.items()}) + "\n")
    parts = ("self_attn.q_proj", "mlp.up_proj")
    names = tuple(f"model.layers.{layer}.{part}.weight" for layer in range(LAYERS) for part in parts)
    for onset in onsets.tolist():
        writer = StatsWriter(folder, PARAMETERS, names, resumed_step=max(onset - 60, 0))
        for step in range(max(onset - 60, 0) + 1, onset + 160):
            writer.append(step, {"grad_norm": rng.random(len(names)) + 8 * (step > onset), "weight_norm": np.ones(len(names))})
        writer.close()
    return folder


def plotly_page(run: Path, out: Path) -> Path:
    subplots, graphs = importlib.import_module("plotly.subplots"), importlib.import_module("plotly.graph_objects")
    columns = read_numbers(run).table
    names = [series[0] for *_, wanted in PANELS for series in wanted[:1] if series[0] in columns]
    figure = subplots.make_subplots(rows=len(names), shared_xaxes=True)
    for row, name in enumerate(names, 1):
        x, y = extremes(columns["step"], columns[name], POINTS)
        figure.add_trace(graphs.Scatter(x=x, y=y, mode="lines", name=name), row=row, col=1)
    figure.write_html(out, include_plotlyjs=True, post_script=f"{PLOTLY_READY}; {PLOTLY_ZOOM};")
    return out


def cpu_ms() -> float:
    """CPU time of the browser so far: of every process that this one started and that still runs."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += 1e3 * (times.user + times.system)
    return total


def look_at(page: Path, steps: int) -> dict[str, float]:
    """Open the page once, zoom and point; return milliseconds."""
    with browser() as tab:
        began = cpu_ms()
        tab.open(page.as_uri(), "document.body?.dataset.openedMs", seconds=300)
        found = {"opened_wall_ms": float(tab.value("document.body.dataset.openedMs")), "opened_ms": cpu_ms() - began}
        assert tab.errors == []
        found["zoom_ms"] = _each(tab, [f"showSteps({first * steps}, {last * steps})" for first, last in ZOOMS])
        began = cpu_ms()
        for i in range(10):
            tab.move(300 + 40 * i, 900)
            tab.value(FRAME)
        return found | {"pointer_ms": (cpu_ms() - began) / 10}


def _each(tab: Page, calls: list[str]) -> float:
    began = cpu_ms()
    for call in calls:
        tab.value(f"(async () => {{ await {call}; await {FRAME}; }})()")
    return (cpu_ms() - began) / len(calls)


def run(args: argparse.Namespace) -> int:
    if args.steps < 1000:
        raise UsageError(f"--steps={args.steps}: must be 1000 or more")
    if args.rounds < 1:
        raise UsageError(f"--rounds={args.rounds}: must be 1 or more")
    if CHROMIUM is None:
        raise UsageError("no chromium on the path: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        made = make_run(Path(folder) / "run", args.steps)
        began = time.process_time()
        pages = {"report": report(made)}
        writing = time.process_time() - began
        if importlib.util.find_spec("plotly"):
            pages["plotly"] = plotly_page(made, Path(folder) / "plotly.html")
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in pages}
        for _ in range(args.rounds):
            for name, page in pages.items():
                rounds[name].append(look_at(page, args.steps))
        found = {}
        for name, looks in rounds.items():
            found[name] = {"megabytes": pages[name].stat().st_size / 1e6}
            found[name] |= {key: statistics.median(look[key] for look in looks) for key in looks[0]}
    if args.json:
        print(json.dumps({"writing_seconds": writing, "pages": found}))
        return GOOD
    print(f"written in {writing:.1f} s of CPU time")
    keys = ("megabytes", "opened_ms", "opened_wall_ms", "zoom_ms", "pointer_ms")
    rows = [[name, *(f"{page[key]:.1f}" for key in keys)] for name, page in found.items()]
    print(table(rows, ["page", "MB", "opened, CPU ms", "opened, ms", "zoom, CPU ms", "pointer, CPU ms"]))
    return GOOD


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=1_000_000, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each page is opened (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, nothing else there")
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
