"""`report RUN`: writes one HTML file that works offline, from a run directory or a log that `scan` reads.

It shows loss, gradient norm, learning rate and loss scale on one axis of steps with the events shaded, the worst data rank,
update ratios, and which layer moved first. Steps that a roll-back undid are drawn too. A line marks where the run went on from a
checkpoint, and a table says what changed there and what that can change.
"""

from __future__ import annotations

import argparse
import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from recipes.common.anomalies.rewinds import read_history
from recipes.common.run_dir.difference import short_value
from recipes.common.run_dir.differences import describe_changes, short_name, verdict
from tools.common.console import GOOD, UsageError, machine_words, tell_notes
from tools.common.html_page import fill, script_json
from tools.common.logs.run_numbers import Numbers, is_run, read_numbers
from tools.common.run_record import open_record, segment_changes
from tools.spikes.report_page.columns import Columns
from tools.spikes.report_page.events import describe_source, figures, hint, list_events
from tools.spikes.report_page.heat_map import heat_map, read_slice

PAGE = Path(__file__).parent / "report_page"
SCRIPTS = ("numbers.js", "series.js", "charts.js", "heat_map.js", "page.js")
NO_MAP = ("step_time", "drift", "load_evenness")  # signals that no layer explains
MOST_MAPS = 12  # events with a map of layers; actionable ones come first
BLUE, GREEN, ORANGE, VIOLET, TEAL, BROWN = "#1c5fb0", "#0b7a4b", "#d9480f", "#6741d9", "#0c8599", "#846358"

# title, unit, height in pixels, style, and the series: column, name in the key, colour
PANELS = (
    ("Loss", "nats", 220, {"settles": True}, (("loss", "training", BLUE), ("val_loss", "validation", GREEN))),
    ("Gradient norm", "before clipping", 110, {"log": True}, (("grad_norm", "norm", ORANGE),)),
    ("Learning rate", "", 80, {"zero": True}, (("lr", "rate", TEAL),)),
    ("Loss scale", "", 80, {"log": True, "base": 2}, (("loss_scale", "scale", BROWN),)),
    ("Update / weight", "of the whole model", 90, {"log": True}, (("update_ratio", "ratio", VIOLET),)),
    ("Worst data rank", "its loss above the mean, nats", 90, {"zero": True}, (("loss_excess", "excess", ORANGE),)),
    ("Which data rank is worst", "", 70, {"integers": True}, (("loss_max_rank", "rank", BROWN),)),
    ("Busiest expert", "its tokens over the mean", 80, {"zero": True}, (("router_load_max/max", "worst layer", ORANGE),)),
    (
        "Evenness of experts",
        "1: equal loads or no preference",
        80,
        {"zero": True},
        (("load_evenness", "loads", TEAL), ("router_entropy", "router", VIOLET)),
    ),
    ("Experts without a token", "in all layers", 70, {"integers": True}, (("dead_experts", "experts", BROWN),)),
    ("Largest logit", "", 80, {}, (("max_logit", "logit", TEAL),)),
    ("Step time", "seconds", 70, {"zero": True}, (("seconds", "seconds", BROWN),)),
)
DOTS = {"val_loss": {"dots": True, "hollow": True, "size": 3.5}, "loss_max_rank": {"dots": True, "crowd": True, "size": 1.6}}
UNDONE = ("loss", "grad_norm", "update_ratio")  # also drawn for steps that were undone


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory or a log")
    parser.add_argument("--out", type=Path, help="the file to write (default: RUN/spikes.html)")


def run(flags: argparse.Namespace) -> int:
    path = report(flags.run, flags.out)
    print(json.dumps({"report": str(path), "bytes": path.stat().st_size}) if flags.json else f"{path}")
    return GOOD


def report(source: Path, out: Path | None = None) -> Path:
    """Write the page and return its path. Raises UsageError if `source` cannot be read or the page not be written."""
    if not source.exists():
        raise UsageError(f"{source}: no such run directory or log")
    columns = Columns()
    numbers = read_numbers(source)
    tell_notes(numbers.notes)
    facts = page_facts(source, numbers, columns)
    out = out or (source / "spikes.html" if source.is_dir() else Path(source.name + ".html"))
    try:
        out.write_text(fill_page(facts, columns), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--out {out}: {machine_words(error) or error}") from None
    return out


def fill_page(facts: dict[str, Any], columns: Columns) -> str:
    fillings = {
        "__TITLE__": html.escape(f"{facts['name']}: training report"),
        "__FACTS__": script_json(facts),
        "__COLUMNS__": columns.encoded(),
        "__SCRIPT__": "\n".join((PAGE / name).read_text(encoding="utf-8") for name in SCRIPTS),
    }
    return fill(PAGE / "page.html", fillings)


def page_facts(source: Path, numbers: Numbers, columns: Columns) -> dict[str, Any]:
    rewinds = [vars(rewind) for rewind in read_history(source)] if is_run(source) else []
    events = list_events(source, numbers.events)
    steps = np.concatenate([table["step"] for table in (numbers.table, *numbers.undone)])
    return {
        "name": source.resolve().name,
        "about": describe_source(source),
        "figures": figures(numbers.table, events, len(rewinds)),
        "first_step": int(steps.min()),
        "last_step": int(steps.max()),
        "rewinds": rewinds,
        "segments": list(segments(source)) if source.is_dir() else [],
        "events": events,
        "events_hint": hint(events),
        "panels": list(panels(numbers, columns)),
        "heat": list(maps(source, events)),
    }


def segments(source: Path) -> Iterator[dict[str, Any]]:
    """Yield each segment of the run, with what changed at it, the gravest first."""
    for segment, differences in segment_changes(open_record(str(source))):
        own = [difference for difference in differences if not difference.follows]
        yield {
            "index": segment.index,
            "cause": segment.cause,
            "step": segment.step,
            "time": segment.time.replace("T", " ").removesuffix("+00:00"),
            "verdict": verdict(differences) if segment.index > 1 else "the first: nothing is before it",
            "label": describe_changes(differences),
            "changes": [
                {
                    "name": short_name(difference.name),
                    "old": short_value(difference.old),
                    "new": short_value(difference.new),
                    "effect": difference.effect.value,
                    "grave": difference.can_change_loss,
                    "note": difference.note,
                }
                for difference in own
            ],
        }


def panels(numbers: Numbers, columns: Columns) -> Iterator[dict[str, Any]]:
    table = dict(numbers.table)
    if not np.nansum(table.get("loss_excess", 0)):  # one data rank has no worst one
        table.pop("loss_max_rank", None)
        table.pop("loss_excess", None)
    for title, unit, height, style, wanted in PANELS:
        series = [
            {"label": label, "color": color, **DOTS.get(column, {}), **columns.series(table["step"], table[column])}
            for column, label, color in wanted
            if column in table and np.isfinite(table[column]).any()
        ]
        if not series:
            continue
        for number, branch in enumerate(numbers.undone):
            if wanted[0][0] in UNDONE and wanted[0][0] in branch:
                name = "undone" if number == 0 else ""
                series.append({"label": name, **columns.series(branch["step"], branch[wanted[0][0]])})
        yield {"title": title, "unit": unit, "height": height, **style, "series": series}


def maps(source: Path, events: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    order = [index for index, event in enumerate(events) if event["first_signal"] not in NO_MAP]
    order.sort(key=lambda index: (not events[index]["actionable"], events[index]["onset"]))
    for index in sorted(order[:MOST_MAPS]) if source.is_dir() else []:
        event = events[index]
        found = read_slice(source, event["box"], event["onset"], event["end"] or event["peak"])
        if found is not None:
            label = f"{event['class'].replace('_', ' ')} at step {event['onset']:,}"
            yield {"event": index, "label": label, **heat_map(found, event["onset"])}
