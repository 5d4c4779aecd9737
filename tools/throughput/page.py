"""Writes the report of a run as one HTML page that works offline and has no script."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tools.common.console import human_bytes
from tools.common.html_page import fill

MOST_BARS = 64  # of more ranks, those that compute longest
MOST_CALLS = 40
MOST_STRAGGLERS = 12
# computing is blue and green, communication warm, waiting grey
COLOURS = {
    "data": "#846358",
    "forward": "#1c5fb0",
    "backward": "#5c9ce6",
    "recompute": "#a5c8f2",
    "weight_gradients": "#0c8599",
    "optimizer": "#0b7a4b",
    "tensor": "#d9480f",
    "context": "#e8751a",
    "expert": "#f76707",
    "pipeline": "#f08c00",
    "bubble": "#ced4de",
    "data_parallel": "#c92a2a",
    "all_ranks": "#e599a7",
    "host": "#6741d9",
    "evaluate": "#9775fa",
    "save": "#b197fc",
    "other": "#5b6475",
}
COMPUTING = ("forward", "backward", "recompute", "weight_gradients", "optimizer")


def page_text(facts: dict[str, Any]) -> str:
    """Return the page for the facts that `tools.throughput.report.gather` returns."""
    layout = facts["layout"]
    about = (
        f"tensor {layout['tensor']} x pipeline {layout['pipeline']} x data {layout['data']}, {layout['schedule']}, "
        f"{facts['micro_batches']} micro batches, {facts['device']}; mean of {facts['steps']} steps, to step {facts['last_step']}"
    )
    sections = [
        _parts(facts),
        _bubble(facts),
        _communication(facts["communication"]),
        _stragglers(facts["stragglers"]),
        _memory(facts),
    ]
    fillings = {
        "__TITLE__": html.escape(f"{facts['name']}: where a step's time goes"),
        "__NAME__": html.escape(facts["name"]),
        "__ABOUT__": html.escape(about),
        "__BODY__": _figures(facts) + "\n".join(filter(None, sections)),
    }
    return fill(Path(__file__).parent / "report_page.html", fillings)


def _figures(facts: dict[str, Any]) -> str:
    parts, step = facts["parts"], facts["step_ms"]
    exposed = sum(parts[part] for part in ("tensor", "context", "expert", "pipeline", "data_parallel", "all_ranks"))
    shown = [
        (f"{step:,.1f} ms", "a step"),
        (f"{100 * sum(parts[part] for part in COMPUTING) / step:.1f} %", "computing"),
        (f"{100 * exposed / step:.1f} %", "exposed communication"),
        (f"{100 * parts['bubble'] / step:.1f} %", "waiting for other stages"),
        (f"{100 * facts['named_share']:.1f} %", "of the step in named parts"),
        (str(sum(each["called"] for each in facts["stragglers"])), "slow ranks"),
    ]
    return (
        '<div class="figures">' + "".join(f"<div><b>{value}</b><span>{what}</span></div>" for value, what in shown) + "</div>\n"
    )


def _parts(facts: dict[str, Any]) -> str:
    ranks = facts["ranks"]
    if len(ranks) > MOST_BARS:
        ranks = sorted(ranks, key=lambda rank: -sum(rank["parts"][part] for part in COMPUTING))[:MOST_BARS]
    used = [part for part in facts["parts"] if any(rank["parts"][part] for rank in ranks)]
    longest = max(sum(rank["parts"].values()) for rank in ranks)
    key = "".join(f'<span class="key"><i style="background:{COLOURS[part]}"></i>{_name(part)}</span>' for part in used)
    bars = []
    for rank in ranks:
        total = sum(rank["parts"].values())
        parts = "".join(
            f'<i style="width:{100 * rank["parts"][part] / longest:.3f}%;background:{COLOURS[part]}" '
            f'title="{_name(part)}: {rank["parts"][part]:.1f} ms, {100 * rank["parts"][part] / total:.1f} %"></i>'
            for part in used
        )
        where = f"stage {rank['stage']}, data {rank['data_rank']}, tensor {rank['tensor_rank']}"
        bars.append(
            f'<div class="bar-row"><span title="{where}">rank {rank["rank"]}</span><div class="stack">{parts}</div></div>'
        )
    rows = [
        [_name(part), f"{facts['parts'][part]:.1f}", f"{100 * facts['parts'][part] / facts['step_ms']:.1f} %",
         *_extremes(facts["ranks"], part)]
        for part in used
    ]  # fmt: skip
    header = ["part", "mean ms", "of the step", "least ms", "most ms", "on rank"]
    hint = (
        "One bar per rank; hover over a part for its numbers."
        if len(ranks) == len(facts["ranks"])
        else f"The {len(ranks)} ranks that compute longest; hover over a part for its numbers."
    )
    return _section("A step, by rank", hint, f'<div class="keys">{key}</div>{"".join(bars)}{_table(rows, header, 1)}')


def _extremes(ranks: list[dict[str, Any]], part: str) -> list[str]:
    least, most = (choose(ranks, key=lambda rank: rank["parts"][part]) for choose in (min, max))
    return [f"{least['parts'][part]:.1f}", f"{most['parts'][part]:.1f}", str(most["rank"])]


def _bubble(facts: dict[str, Any]) -> str:
    bubble, balance = facts["bubble"], facts["balance"]
    if bubble is None:
        return ""
    names = {
        "formula": "by the formula for equal stages",
        "imbalance": "unequal stages",
        "exposed_p2p": "exposed messages",
        "warm_up": "warm-up and uneven passes",
        "measured": "measured",
    }
    rows = [
        [text, f"{100 * bubble[name]:{'.1f' if name in ('formula', 'measured') else '+.1f'}} %"] for name, text in names.items()
    ]
    stages = [
        [str(stage), f"{ms:.2f}", _layers(runs), _layers(better), f"{better_ms:.2f}"]
        for stage, (ms, runs, better, better_ms) in enumerate(
            zip(balance["stage_ms"], balance["partition"], balance["better_partition"], balance["better_stage_ms"], strict=True)
        )
    ]
    same = balance["better_partition"] == balance["partition"]
    verdict = (
        "No other partition is faster."
        if same
        else f"Layout({balance['better_field']}) would save {100 * balance['saved_share']:.1f} % of the step."
    )
    header = ["stage", "ms per micro batch", "layers", "best layers", "expected ms"]
    text = _table(rows, ["share of the time of all passes", ""], 1) + _table(stages, header, 1)
    return _section("The pipeline", f"The bubble and the balance of the stages. {verdict}", f'<div class="two">{text}</div>')


def _layers(runs: list[tuple[int, int]]) -> str:
    return ", ".join(f"{start} to {stop - 1}" for start, stop in runs)


def _communication(calls: list[dict[str, Any]]) -> str:
    def rate(value: float | None) -> str:
        return "" if value is None else f"{value:.3g}"

    rates = ("algorithm_gb_s", "bus_gb_s", "best_bus_gb_s")
    rows = [
        [c["group"], c["op"], human_bytes(c["bytes"]), str(c["ranks"]), f"{c['calls_per_step']:.1f}", f"{c['ms_per_step']:.2f}",
         f"{c['mean_us']:,.0f}", f"{c['least_us']:,.0f}", *(rate(c[name]) for name in rates)]
        for c in calls[:MOST_CALLS]
    ]  # fmt: skip
    times = ["calls per step", "ms per step", "mean us", "least us"]
    header = ["group", "operation", "size", "ranks", *times, "algorithm GB/s", "bus GB/s", "fastest"]
    hint = "Per rank, averaged over the ranks. Times include waiting for the other ranks, least in the fastest call."
    return _section("Communication", hint, _table(rows, header, 2)) if rows else ""


def _stragglers(stragglers: list[dict[str, Any]]) -> str:
    rows = [
        [str(s["rank"]), str(s["stage"]), s["host"], f"{s['compute_ms']:.1f}", f"{100 * s['slower']:+.2f} %", f"{s['score']:.1f}",
         "slow" if s["called"] else "", f"{s['gain_ms']:.1f}"]
        for s in stragglers[:MOST_STRAGGLERS]
    ]  # fmt: skip
    header = ["rank", "stage", "host", "computing, ms", "against its peers", "score", "", "gain without it, ms"]
    hint = "By computing time, against the other ranks of their stage."
    return _section("Slow ranks", hint, _table(rows, header, 3)) if rows else ""


def _memory(facts: dict[str, Any]) -> str:
    ranks = [rank for rank in facts["ranks"] if rank["memory"]][:MOST_BARS]
    names = list(dict.fromkeys(name for rank in ranks for name in rank["memory"]))
    rows = [[str(r["rank"]), str(r["stage"]), *(human_bytes(r["memory"].get(name, 0)) for name in names)] for r in ranks]
    header = ["rank", "stage", *(_name(name) for name in names)]
    return _section("Memory", "The sizes of the tensors.", _table(rows, header, 2)) if rows else ""


def _section(title: str, hint: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2><p>{html.escape(hint)}</p>{body}</section>"


def _table(rows: Iterable[Sequence[str]], header: Sequence[str], words: int) -> str:
    """words: the number of columns from the left that hold text."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(
            f'<{tag}{"" if i < words else " class=number"}>{html.escape(cell)}</{tag}>' for i, cell in enumerate(cells)
        ) + "</tr>"  # fmt: skip

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table><thead>{line(header, "th")}</thead><tbody>{body}</tbody></table></div>'


def _name(part: str) -> str:
    return part.replace("_", " ")
