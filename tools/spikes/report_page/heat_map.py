"""Computes the map of layers and steps around an event: each statistic relative to its own median before the onset."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipes.common.monitor.parameter_groups import PARTS, group_of
from recipes.common.run_dir.tensor_stats import read_stats
from tools.common.console import UsageError

STEPS_BEFORE, STEPS_AFTER, LONGEST = 48, 16, 128
MOST = 3.0  # powers of two, either way, at which the colours end
NOT_FINITE = 9.0  # stands for NaN and Inf, above every clipped value
STATS = {
    "grad_norm": "gradient norm",
    "update_ratio": "update / weight",
    "adam_rms": "RMS of g / sqrt(v)",
    "weight_norm": "weight norm",
}


@dataclass(frozen=True)
class Slice:
    steps: np.ndarray  # int64 [n]
    names: tuple[str, ...]  # of parameters [p]
    values: dict[str, np.ndarray]  # statistic -> [n, p]


def read_slice(run_dir: Path, box: str | None, onset: int, last: int) -> Slice | None:
    """Read the statistics around an event from its black box (its steps may have been undone since), else from the run."""
    first, last = onset - STEPS_BEFORE, min(last, onset + LONGEST) + STEPS_AFTER
    file = run_dir / "events" / (box or "") / "tensor_stats.npz"
    if box and file.is_file():
        found = _read_box(file)
    elif (run_dir / "tensor_stats").is_dir():
        stats = read_stats(run_dir, first, last)
        found = Slice(stats.steps, stats.names, stats.values)
    else:
        return None
    inside = (found.steps >= first) & (found.steps <= last)
    if inside.sum() < 2:
        return None
    return Slice(found.steps[inside], found.names, {stat: values[inside] for stat, values in found.values.items()})


def _read_box(file: Path) -> Slice:
    """Read the statistics in a black box. Raises UsageError for a damaged file."""
    prefix = "values/"
    try:
        with np.load(file) as arrays:
            values = {key.removeprefix(prefix): arrays[key] for key in arrays.files if key.startswith(prefix)}
            return Slice(arrays["steps"], tuple(arrays["names"].tolist()), values)
    except (ValueError, KeyError, AttributeError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"{file} is damaged ({' '.join(str(error).split())[:100]}); delete it") from None


def heat_map(found: Slice, onset: int) -> dict[str, Any]:
    """Return the map as JSON: rows by layer and by part, and for each statistic log2 of value / median before, row by row."""
    layers, parts = _rows(found.names)
    stats = []
    for stat, label in STATS.items():
        if stat in found.values:
            maps = {
                kind: _relative(found, stat, list(rows.values()), onset) for kind, rows in (("layers", layers), ("parts", parts))
            }
            stats.append({"label": label, **maps})
    return {
        "onset": onset,
        "steps": found.steps.tolist(),
        "most": MOST,
        "layers": list(layers),
        "parts": list(parts),
        "stats": stats,
    }


def _rows(names: Sequence[str]) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Return row -> indices of its parameters, by layer (from input to output) and by part of a layer."""
    groups = [group_of(name) for name in names]
    outside = {"embedding": "embedding", "norm": "final norm", "head": "head"}
    numbers = sorted({layer for layer, _ in groups if layer is not None})
    order = ["embedding", *(f"layer {number}" for number in numbers), "final norm", "head", "other"]
    layers: dict[str, list[int]] = {name: [] for name in order}
    parts: dict[str, list[int]] = {part.replace("_", " "): [] for part in PARTS}
    for index, (layer, part) in enumerate(groups):
        layers[outside.get(part, "other") if layer is None else f"layer {layer}"].append(index)
        parts[part.replace("_", " ")].append(index)
    return ({name: found for name, found in rows.items() if found} for rows in (layers, parts))


def _relative(found: Slice, stat: str, rows: list[list[int]], onset: int) -> list[float | None]:
    """Return log2 of each row's value over its median before the onset, [rows x steps] flattened; None if not recorded."""
    values = np.stack([_joined(found, stat, row) for row in rows])
    before = found.steps < onset - 1
    with np.errstate(all="ignore"):
        usual = np.nanmedian(
            np.where(np.isfinite(values), values, np.nan)[:, before if before.sum() >= 4 else slice(None)], axis=1
        )
        relative = np.clip(np.log2(values / usual[:, None]), -8.5, 8.5)
    relative[~np.isfinite(values)] = NOT_FINITE
    relative[np.stack([np.isnan(found.values[stat][:, row]).all(axis=1) for row in rows])] = np.nan  # not recorded
    if "nonfinite" in found.values:
        relative[np.stack([(found.values["nonfinite"][:, row] > 0).any(axis=1) for row in rows])] = NOT_FINITE
    return [None if np.isnan(value) else round(float(value), 2) for value in relative.ravel()]


def _joined(found: Slice, stat: str, row: list[int]) -> np.ndarray:
    """Return one number per step [n] for a row: norms and rms values join by their squares, ratios by their norms."""
    values = {name: array[:, row].astype(np.float64) for name, array in found.values.items()}

    def norm(name: str) -> np.ndarray:
        return np.sqrt((values[name] ** 2).sum(axis=1))

    if stat == "update_ratio" and {"update_norm", "weight_norm"} <= values.keys():
        return norm("update_norm") / norm("weight_norm")
    return norm(stat) if stat.endswith("_norm") else np.sqrt((values[stat] ** 2).mean(axis=1))
