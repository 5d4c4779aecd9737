"""Fills the templates of the HTML reports. A report is one file: no script, style, font or picture is loaded from elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STYLE = Path(__file__).parent / "report.css"  # of all reports, at __STYLE__


def fill(template: Path, fillings: Mapping[str, str]) -> str:
    """Return the template with every name replaced by its HTML. What is filled in is not searched for names again."""
    fillings = {"__STYLE__": STYLE.read_text(encoding="utf-8"), **fillings}
    return re.sub("|".join(fillings), lambda name: fillings[name[0]], template.read_text(encoding="utf-8"))


def script_json(value: Any) -> str:
    """Return JSON for a script element. No text in it can end the element or open a comment, since no "<" is left."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
