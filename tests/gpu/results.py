"""Keeps what the tier found, one JSON file that is complete after each check, and draws it as one page."""

from __future__ import annotations

import html
import json
import os
from pathlib import Path
from typing import Any

from tools.common.html_page import fill

JSON_NAME, PAGE_NAME = "results.json", "results.html"
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
TEMPLATE = Path(__file__).parent / "page.html"


def read_results(folder: Path, machine: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return check -> result of an earlier call on the same machine, code and versions; of any other, nothing."""
    path = folder / JSON_NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return found["checks"] if found["machine"] == machine else {}


def write_results(folder: Path, machine: dict[str, Any], command: str, checks: dict[str, dict[str, Any]]) -> None:
    """Write the JSON file and the page; a call that is killed leaves those of before."""
    found = {"machine": machine, "command": command, "passed": all_passed(checks), "checks": checks}
    for name, text in ((JSON_NAME, json.dumps(found, indent=1)), (PAGE_NAME, page(found))):
        hidden = folder / f".{name}"
        hidden.write_text(text, encoding="utf-8")
        os.replace(hidden, folder / name)


def all_passed(checks: dict[str, dict[str, Any]]) -> bool:
    return all(result["verdict"] != FAILED for result in checks.values())


def page(found: dict[str, Any]) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in found["machine"].items() if value not in ("", None))
    rows = "\n".join(_row(name, result) for name, result in found["checks"].items())
    counts = ", ".join(
        f"{count} {verdict}"
        for verdict in (PASSED, FAILED, SKIPPED)
        if (count := sum(result["verdict"] == verdict for result in found["checks"].values()))
    )
    return fill(
        TEMPLATE,
        {
            "__COUNTS__": html.escape(counts or "nothing yet"),
            "__MACHINE__": html.escape(machine),
            "__COMMAND__": html.escape(found["command"]),
            "__ROWS__": rows,
        },
    )


def _row(name: str, result: dict[str, Any]) -> str:
    figures = json.dumps(result["figures"], indent=1) if result["figures"] else ""
    shown = f"<details><summary>figures</summary><pre>{html.escape(figures)}</pre></details>" if figures else ""
    why = f"<p>{html.escape(result['why'])}</p>" if result["why"] else ""
    return (
        f'<tr class="{result["verdict"]}"><td>{html.escape(name)}</td><td>{result["verdict"]}</td>'
        f"<td>{result['seconds']:.1f}</td><td>{html.escape(result['about'])}{why}{shown}</td></tr>"
    )
