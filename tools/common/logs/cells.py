"""Reads numbers as programs, spreadsheets and editors spell them: thousands separators, decimal commas, NaN of every compiler."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from recipes.common.run_dir.metrics import NON_FINITE
from tools.common.console import UsageError

NAN = r"[-+]?(?:nan(?:\([^)\s]*\))?|1\.?#(?:qnan|snan|ind|nan)\d*)"  # 1.#IND, -nan(ind): Microsoft's C library
INF = r"[-+]?(?:inf(?:inity)?|1\.?#inf\d*|\u221e)"
_NAN, _INF = re.compile(NAN, re.IGNORECASE), re.compile(INF, re.IGNORECASE)
_POWER = r"(?:[eE][-+]?\d+)?"
_SPACES = " '\u00a0\u2009\u202f"
_THOUSANDS = re.compile(rf"[-+]?[1-9]\d{{0,2}}(?:(?:,\d{{3}})+|(?:[{_SPACES}]\d{{3}})+)(?:\.\d*)?")
_DECIMAL = re.compile(rf"[-+]?\d*,\d+{_POWER}")
_EITHER = re.compile(r"[-+]?[1-9]\d{0,2},\d{3}")  # 2,891 may be 2.891 or 2891
_POINTED = re.compile(rf"[-+]?[\d,]*\.\d+{_POWER}")
_MISSING = frozenset({"", "na", "n/a", "#n/a", "<na>", "null", "none", "-", "--"})


def number_of(cell: object, *, decimal_comma: bool = False) -> float | None:
    """Return a cell's number; None if it is empty or text. "NaN" and the like are numbers that are not finite."""
    if isinstance(cell, str):
        return _number_in(cell.strip(), decimal_comma)
    if cell is None or isinstance(cell, bool):
        return None
    try:
        return float(cell)
    except (TypeError, ValueError, OverflowError):
        return None


def _number_in(text: str, decimal_comma: bool) -> float | None:
    if text in NON_FINITE:
        return NON_FINITE[text]
    if decimal_comma and _DECIMAL.fullmatch(text):
        return float(text.replace(",", "."))
    try:
        return float(text)
    except ValueError:
        pass
    if _THOUSANDS.fullmatch(text):
        return float(re.sub(rf"[,{_SPACES}]", "", text))
    if _NAN.fullmatch(text):
        return math.nan
    if _INF.fullmatch(text):
        return -math.inf if text.startswith("-") else math.inf
    return None


def step_of(cell: object) -> float:
    """Return a step; NaN for what is none. Steps are whole: 1,000 is a thousand, and 0,1 a fraction."""
    step = number_of(cell)
    step = number_of(cell, decimal_comma=True) if step is None else step
    return math.nan if step is None else step


def is_unread(cell: object) -> bool:
    """Whether a cell holds something, and no number."""
    return cell is not None and number_of(cell) is None and not (isinstance(cell, str) and cell.strip().lower() in _MISSING)


def has_decimal_commas(name: str, cells: Iterable[object]) -> bool:
    """Return whether a comma in these numbers of a file is a decimal point. Raises UsageError where that cannot be told."""
    texts = [cell.strip() for cell in cells if isinstance(cell, str)]
    commas = [text for text in texts if "," in text and (_DECIMAL.fullmatch(text) or _THOUSANDS.fullmatch(text))]
    if not commas:
        return False
    either = next((text for text in commas if _EITHER.fullmatch(text)), None)
    decimal = next((text for text in commas if not _THOUSANDS.fullmatch(text)), None)
    pointed = next((text for text in texts if _POINTED.fullmatch(text)), None)
    thousands = pointed or next((text for text in commas if not _DECIMAL.fullmatch(text)), None)
    cure = "write decimal points, and no separators of thousands"
    if decimal is not None and thousands is not None:
        raise UsageError(f"{name} has numbers such as {decimal!r} and {thousands!r}: what its commas are cannot be told; {cure}")
    if decimal is None and thousands is None:
        raise UsageError(f"{name} has {either!r}, which may be {either.replace(',', '.')} or {either.replace(',', '')}; {cure}")
    return decimal is not None


class Commas:
    """Tells what the commas in the numbers of a text log are. A line where that is certain decides for those after it."""

    def __init__(self, name: str, *, alone: bool) -> None:
        """alone: each number has a line of its own, as in OLMo's logs, which separate thousands."""
        self._name, self._alone, self._decimal = name, alone, False

    def are_decimal(self, numbers: Sequence[str]) -> bool:
        """Return whether commas are decimal points in the numbers of a line. Raises UsageError where none can tell."""
        commas = [number for number in numbers if "," in number]
        if not commas:
            return False
        if all(_EITHER.fullmatch(number) for number in commas) and (self._decimal or self._alone):
            return self._decimal
        self._decimal = has_decimal_commas(self._name, numbers)
        return self._decimal
