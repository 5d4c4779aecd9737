"""`report RUN`: one HTML file that works offline, of a run directory or of a log that `scan` reads.

Loss, gradient norm, learning rate and loss scale on one axis with the events shaded, the worst data rank, update ratios, and
which layer moved first. Steps that a rewind undid are drawn too.
"""

from __future__ import annotations

import argparse
import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from recipes.common.black_box import read_boxes
from recipes.common.rewinds import describe_rewind, read_history
from tools.common.console import GOOD, UsageError
from tools.spikes.report_columns import Columns
from tools.spikes.report_heat import heat_map, read_slice

MOST_MAPS = 12  # events with a map of layers; those that call for something come first
BLUE, GREEN, ORANGE, VIOLET, TEAL, BROWN = "#1c5fb0", "#0b7a4b", "#d9480f", "#6741d9", "#0c8599", "#846358"
Table = dict[str, np.ndarray]  # column -> [n], NaN where a step lacks it; "step" is whole

# title, unit, height, look, and the series: column, name in the key, colour
PANELS = (
    ("Loss", "nats", 220, {"settles": True}, (("loss", "training", BLUE), ("val_loss", "validation", GREEN))),
    ("Gradient norm", "before clipping", 110, {"log": True}, (("grad_norm", "", ORANGE),)),
    ("Learning rate", "", 80, {"zero": True}, (("lr", "", TEAL),)),
    ("Loss scale", "", 80, {"log": True}, (("loss_scale", "", BROWN),)),
    ("Update / weight", "of the whole model", 90, {"log": True}, (("update_ratio", "", VIOLET),)),
    ("Worst data rank", "its loss above the mean, nats", 90, {"zero": True}, (("loss_excess", "", ORANGE),)),
    ("Which data rank is worst", "", 70, {"integers": True}, (("loss_max_rank", "", BROWN),)),
    ("Largest logit", "", 80, {}, (("max_logit", "", TEAL),)),
    ("Step time", "seconds", 70, {"zero": True}, (("seconds", "", BROWN),)),
)
DOTS = {"val_loss": {"dots": True, "hollow": True, "size": 3.5}, "loss_max_rank": {"dots": True, "size": 1.4}}


def run(flags: argparse.Namespace) -> int:
    path = report(flags.run, flags.out)
    print(json.dumps({"report": str(path), "bytes": path.stat().st_size}) if flags.json else f"{path}")
    return GOOD


def report(source: Path, out: Path | None = None) -> Path:
    """Write the page and give its path. Raises UsageError for what cannot be read or written."""
    table, undone = read_tables(source)
    columns = Columns()
    facts = page_facts(source, table, undone, columns)
    folder = Path(__file__).parent
    page = (folder / "report_page.html").read_text(encoding="utf-8")
    fillings = {
        "__TITLE__": html.escape(f"{facts['name']}: training report"),
        "__FACTS__": json.dumps(facts, allow_nan=False, separators=(",", ":")).replace("</", "<\\/"),
        "__COLUMNS__": columns.encoded(),
        "__SCRIPT__": (folder / "report_page.js").read_text(encoding="utf-8"),
    }
    head, *pieces = _split(page, list(fillings))
    out = out or (source / "spikes.html" if source.is_dir() else source.with_name(source.name + ".html"))
    try:
        out.write_text(head + "".join(fillings[name] + rest for name, rest in pieces), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--out {out}: {error}") from None
    return out


def _split(page: str, names: list[str]) -> Iterator[Any]:
    """The template between its places, so that what one is filled with is never searched for the next."""
    places = sorted((page.index(name), name) for name in names)
    yield page[: places[0][0]]
    for number, (at, name) in enumerate(places):
        end = places[number + 1][0] if number + 1 < len(places) else len(page)
        yield name, page[at + len(name) : end]


def page_facts(source: Path, table: Table, undone: list[Table], columns: Columns) -> dict[str, Any]:
    steps = table["step"]
    rewinds = [vars(rewind) for rewind in read_history(source)] if source.is_dir() else []
    events = list_events(source, table)
    return {
        "name": source.resolve().name,
        "about": describe_source(source),
        "figures": figures(table, events, len(rewinds)),
        "first_step": int(min(steps.min(), 1) if source.is_dir() else steps.min()),
        "last_step": int(max([steps.max(), *(branch["step"].max() for branch in undone)])),
        "rewinds": rewinds,
        "events": events,
        "events_hint": hint(events),
        "panels": list(panels(table, undone, columns)),
        "heat": list(maps(source, events)),
        "footer": "Each line is the mean of what falls on one pixel, the band behind it from the lowest to the highest value.",
    }


def panels(table: Table, undone: list[Table], columns: Columns) -> Iterator[dict[str, Any]]:
    for title, unit, height, look, wanted in PANELS:
        series = []
        for column, label, color in wanted:
            for number, branch in enumerate(undone if column in ("loss", "grad_norm") else []):
                if column in branch:
                    name = "undone by a rewind" if number == 0 and column == "loss" else ""
                    series.append({"label": name, **columns.series(branch["step"], branch[column])})
            if column in table and np.isfinite(table[column]).any():
                place = columns.series(table["step"], table[column])
                series.insert(0, {"label": label or "at the pointer", "color": color, **DOTS.get(column, {}), **place})
        if any("color" in one for one in series):
            yield {"title": title, "unit": unit, "height": height, **look, "series": series}


def maps(source: Path, events: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    order = sorted(range(len(events)), key=lambda i: (not events[i]["actionable"], events[i]["onset"]))
    for index in sorted(order[:MOST_MAPS]) if source.is_dir() else []:
        event = events[index]
        found = read_slice(source, event["box"], event["onset"], event["end"] or event["peak"])
        if found is not None:
            label = f"{event['class'].replace('_', ' ')} at step {event['onset']:,}"
            yield {"event": index, "label": label, **heat_map(found, event["onset"])}
