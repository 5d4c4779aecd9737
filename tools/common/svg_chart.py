"""Lines on axes as one small SVG file: no script, no font, no colour that the page around it could change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 760, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 34, 44  # margins of the plane; the key lies in the top one
KEY_ROW, LETTER = 18, 6.6  # pixels: a row of the key, a letter of it
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31")  # Okabe and Ito's
MOST_POINTS = 400  # of a line: more than one a pixel or two would not be seen
DOTTED = 40  # lines of fewer points show each as a dot
INK, GRID, FONT = "#24292f", "#d8dee4", "font-family='Helvetica, Arial, sans-serif' font-size='12'"


@dataclass(frozen=True)
class Line:
    name: str
    x: np.ndarray  # [n], rising
    y: np.ndarray  # [n]


@dataclass(frozen=True)
class Axis:
    """One direction of the plane: from `low` to `high` on pixels `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def pixels(self, values: np.ndarray) -> np.ndarray:
        low, high, values = (np.log10(v) if self.log else np.asarray(v, float) for v in (self.low, self.high, values))
        return self.start + (values - low) / (high - low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1, 2, 5) if last - first < 4 else (1,)
            found = [factor * 10.0**power for power in range(first, last + 1) for factor in steps]
        else:
            raw = (self.high - self.low) / 6
            unit = 10.0 ** math.floor(math.log10(raw))
            unit *= next(factor for factor in (1, 2, 5, 10) if factor * unit >= raw)
            found = [index * unit for index in range(math.ceil(self.low / unit), math.floor(self.high / unit) + 1)]
        slack = 1e-9 * (self.high - self.low)
        return [tick for tick in found if self.low - slack <= tick <= self.high + slack]


def chart(lines: Sequence[Line], *, x_name: str, y_name: str, limits: tuple[float, float] | None, log: bool) -> str:
    """The file's text. `limits`: of y; what lies outside is cut off (default: all that there is)."""
    x_low, x_high = _reach(np.concatenate([line.x for line in lines]))
    y_low, y_high = limits or _reach(np.concatenate([line.y for line in lines]))
    if limits is None and not log:
        y_low, y_high = y_low - 0.03 * (y_high - y_low), y_high + 0.03 * (y_high - y_low)
    across = Axis(x_low, x_high, LEFT, WIDTH - RIGHT)
    up = Axis(y_low, y_high, HEIGHT - BOTTOM, TOP, log)
    key, rows = _key([line.name for line in lines])
    above = KEY_ROW * (rows - 1)
    size = f"viewBox='0 {-above} {WIDTH} {HEIGHT + above}' width='{WIDTH}' height='{HEIGHT + above}'"
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' {size} {FONT}>",
        f"<rect y='{-above}' width='{WIDTH}' height='{HEIGHT + above}' fill='#ffffff'/>",
        f"<clipPath id='plane'><rect x='{LEFT}' y='{TOP}' width='{WIDTH - LEFT - RIGHT}' height='{HEIGHT - TOP - BOTTOM}'/>"
        "</clipPath>",
        *_grid(across, up, x_name, y_name),
        "<g clip-path='url(#plane)' fill='none' stroke-width='1.6' stroke-linejoin='round'>",
        *(_line(line, COLORS[index % len(COLORS)], across, up) for index, line in enumerate(lines)),
        "</g>",
        *key,
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _reach(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 0.5 * abs(low or 1), high + 0.5 * abs(high or 1))


def _grid(across: Axis, up: Axis, x_name: str, y_name: str) -> list[str]:
    parts = []
    for tick, x in zip(across.ticks(), across.pixels(np.array(across.ticks())), strict=True):
        parts.append(f"<path d='M{x:.1f} {TOP}V{HEIGHT - BOTTOM}' stroke='{GRID}'/>")
        parts.append(f"<text x='{x:.1f}' y='{HEIGHT - BOTTOM + 16}' text-anchor='middle' fill='{INK}'>{_number(tick)}</text>")
    for tick, y in zip(up.ticks(), up.pixels(np.array(up.ticks())), strict=True):
        parts.append(f"<path d='M{LEFT} {y:.1f}H{WIDTH - RIGHT}' stroke='{GRID}'/>")
        parts.append(f"<text x='{LEFT - 6}' y='{y + 4:.1f}' text-anchor='end' fill='{INK}'>{_number(tick)}</text>")
    middle, height = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f"<text x='{middle:.0f}' y='{HEIGHT - 8}' text-anchor='middle' fill='{INK}'>{escape(x_name)}</text>")
    parts.append(
        f"<text transform='translate(14 {height:.0f}) rotate(-90)' text-anchor='middle' fill='{INK}'>{escape(y_name)}</text>"
    )
    return parts


def _line(line: Line, color: str, across: Axis, up: Axis) -> str:
    chosen = np.unique(np.linspace(0, len(line.x) - 1, min(len(line.x), MOST_POINTS)).round().astype(int))
    points = [f"{x:.1f} {y:.1f}" for x, y in zip(across.pixels(line.x[chosen]), up.pixels(line.y[chosen]), strict=True)]
    path = f"<path d='M{'L'.join(points)}' stroke='{color}'/>"
    if len(points) < DOTTED:
        path += "".join(f"<circle cx='{x}' cy='{y}' r='3' fill='{color}'/>" for x, y in (point.split() for point in points))
    return path


def _key(names: Sequence[str]) -> tuple[list[str], int]:
    """(its parts, its rows): left to right, and upwards from the plane."""
    parts, x, row = [], float(LEFT), 0
    for index, name in enumerate(names):
        width = 39 + LETTER * len(name)
        if x + width > WIDTH and x > LEFT:
            x, row = float(LEFT), row + 1
        color, y = COLORS[index % len(COLORS)], 16 - KEY_ROW * row
        parts.append(f"<path d='M{x:.0f} {y}h18' stroke='{color}' stroke-width='3'/>")
        parts.append(f"<text x='{x + 23:.0f}' y='{y + 4}' fill='{INK}'>{escape(name)}</text>")
        x += width
    return parts, row + 1


def _number(value: float) -> str:
    """As one would say it: 1.2M, 0.004."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:.6g}"
