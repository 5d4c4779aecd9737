"""Reads and writes the values of the models' terms: the shipped fit, or a machine's calibration.

    {"time": {term: value}, "memory": {term: value}, "device_factor": {GPU: factor}, "layer_factor": [[shape, factor], ...],
     "spread": {"time": s, "memory": s}, "provenance": {"date", "rows", ...}}

`spread` is the 90th percentile of relative errors on rows that the fit had not seen. `python -m tests.bench.planner fit` wrote
the shipped file from published tables.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipes.common.config.json_files import read_json
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
        found = read_json(path)
        return Coefficients(
            time=np.array([float(found["time"][term]) for term in time_model.TERMS]),
            memory=np.array([float(found["memory"][term]) for term in memory_model.TERMS]),
            device_factor={str(k): float(v) for k, v in found["device_factor"].items()},
            layer_factor={tuple(float(x) for x in shape): float(v) for shape, v in found["layer_factor"]},
            time_spread=float(found["spread"]["time"]),
            memory_spread=float(found["spread"]["memory"]),
            provenance=dict(found["provenance"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(f"{path}: not a file of `plan calibrate` or `plan fit` ({reason}); write it again") from error


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
    path.write_text(json.dumps(content, indent=1) + "\n")


def first_principles() -> Coefficients:
    return Coefficients(
        time=time_model.PRIOR, memory=memory_model.PRIOR, device_factor={}, layer_factor={}, time_spread=0.3,
        memory_spread=memory_model.SPREAD, provenance={"fitted on": "nothing: data sheets and formulas"},
    )  # fmt: skip
