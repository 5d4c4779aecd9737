"""Reads and writes the values of the models' terms: the shipped fit, or a machine's calibration.

    {"time": {term: value}, "memory": {term: value}, "device_factor": {GPU: factor}, "layer_factor": [[shape, factor], ...],
     "spread": {"time": s, "memory": s}, "provenance": {"date", "rows", ...}}

`spread` is the 90th percentile of relative errors on rows that the fit had not seen. `python -m tests.bench.planner fit` wrote
the shipped file from published tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipes.common.config.json_files import JsonError, read_json, write_json
from tools.common.console import UsageError
from tools.common.devices import Device
from tools.plan import memory_model, time_model
from tools.plan.time_model import Cases

SHIPPED = Path(__file__).with_name("coefficients.json")


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    time: np.ndarray
    memory: np.ndarray
    device_factor: dict[str, float]  # GPU -> factor on a layer's time, where tables of that GPU were fitted
    layer_factor: dict[tuple, float]  # shape of layer -> factor, in a calibration
    time_spread: float
    memory_spread: float
    provenance: dict[str, Any]

    def factors(self, device: Device, cases: Cases) -> np.ndarray:
        """Return the factor [n] on each case's layer time."""
        general = self.device_factor.get(device.name, 1.0)
        return np.array([self.layer_factor.get(key, general) for key in cases.keys])


def read_coefficients(path: Path | None) -> Coefficients:
    """Read a file of coefficients; the shipped one if `path` is None. Raises UsageError for any other file."""
    path = SHIPPED if path is None else path
    try:
        found = read_json(path, unique=True)
    except JsonError as error:
        raise UsageError(f"{error}; write it again with `plan calibrate`") from error
    if problems := _problems(found):
        raise UsageError(f"{path}: not a file of `plan calibrate` of this version: {'; '.join(problems)}; write it again")
    return Coefficients(
        time=np.array([float(found["time"][term]) for term in time_model.TERMS]),
        memory=np.array([float(found["memory"][term]) for term in memory_model.TERMS]),
        device_factor={name: float(value) for name, value in found["device_factor"].items()},
        layer_factor={tuple(map(float, shape)): float(value) for shape, value in found["layer_factor"]},
        time_spread=float(found["spread"]["time"]),
        memory_spread=float(found["spread"]["memory"]),
        provenance=found["provenance"],
    )


def _problems(found: dict[str, Any]) -> list[str]:
    """List all that `write_coefficients` would not have written."""
    parts = ("provenance", "time", "memory", "device_factor", "layer_factor", "spread")
    problems = [f"{name} is missing" for name in parts if name not in found]
    problems += [f"{name} is not known" for name in found if name not in parts]
    for part, terms in (("time", time_model.TERMS), ("memory", memory_model.TERMS), ("spread", ("time", "memory"))):
        given = found.get(part, dict.fromkeys(terms, 1.0))
        if not isinstance(given, dict):
            problems.append(f"{part} must be an object")
            continue
        problems += [f"{part}.{term} is missing" for term in terms if term not in given]
        problems += [f"{part}.{term} is not known" for term in given if term not in terms]
        problems += _not_positive(part, {term: value for term, value in given.items() if term in terms})
    factors, layers = found.get("device_factor", {}), found.get("layer_factor", [])
    problems += _not_positive("device_factor", factors) if isinstance(factors, dict) else ["device_factor must be an object"]
    if not isinstance(layers, list) or not all(map(_is_layer, layers)):
        problems.append("layer_factor must be a list of [[number, ...], number over 0]")
    if not isinstance(found.get("provenance", {}), dict):
        problems.append("provenance must be an object")
    return problems


def _not_positive(part: str, values: dict[str, Any]) -> list[str]:
    return [f"{part}.{name}={value!r} must be a number over 0" for name, value in values.items() if not _is_positive(value)]


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e300


def _is_layer(entry: Any) -> bool:
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], list):
        return False
    return all(type(size) in (int, float) and abs(size) < 1e300 for size in entry[0]) and _is_positive(entry[1])


def write_coefficients(path: Path, coefficients: Coefficients) -> None:
    def rounded(values: np.ndarray, terms: dict) -> dict[str, float]:
        return {term: float(f"{value:.5g}") for term, value in zip(terms, values.tolist(), strict=True)}

    content = {
        "provenance": coefficients.provenance,
        "time": rounded(coefficients.time, time_model.TERMS),
        "memory": rounded(coefficients.memory, memory_model.TERMS),
        "device_factor": {name: round(value, 4) for name, value in coefficients.device_factor.items()},
        "layer_factor": [[list(shape), round(value, 4)] for shape, value in coefficients.layer_factor.items()],
        "spread": {"time": round(coefficients.time_spread, 4), "memory": round(coefficients.memory_spread, 4)},
    }
    write_json(path, content)


def first_principles() -> Coefficients:
    return Coefficients(
        time=time_model.PRIOR, memory=memory_model.PRIOR, device_factor={}, layer_factor={}, time_spread=0.3,
        memory_spread=memory_model.SPREAD, provenance={"fitted on": "nothing: data sheets and formulas"},
    )  # fmt: skip
