"""`spikes compare RUN RUN`: finds common spikes, the step where the losses part, and what differs between the runs.

With one order of data, common spikes come from the data; others come from the dynamics of training.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipes.common.anomalies.detector import scan
from recipes.common.anomalies.events import KINDS
from recipes.common.config.json_files import laid_out, read_json
from recipes.common.run_dir.segments import changed_facts, read_chain
from tools.common.console import GOOD, UsageError, printable, table, tell_notes
from tools.common.logs.log import Log
from tools.common.logs.reader import read_log

SHOWN = 12  # steps and differing fields
ABSENT = "(absent)"
FILES = ("recipe.json", "deepspeed.json", "run.json")
# fields of run.json that differ between any two starts and do not change the numbers
OF_EVERY_START = ("run_id", "time", "command", "working_directory", "resumed_step", "hosts", "history", "segments")
# what of the record is not in the other files: code, packages, machines, data
OF_THE_RECORD = ("git.", "code.", "package.", "library.", "host.", "environment.", "threads.", "data.", "tokenizer.")
# fields of the recipe that decide which sequences a step reads
DATA_ORDER = ("data", "seed", "batch")
CHANCE = 1e-3  # common steps that are less probable than this by chance have a common cause
MOST, HARDLY_ANY = 0.5, 0.1  # shares of the smaller set in common: from the first on the data, up to the second the dynamics
FEW = 2  # with fewer spikes in the quieter run, none in common says nothing


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs=2, metavar="RUN", help="a run directory or a log")


def run(flags: argparse.Namespace) -> int:
    found = compare_runs(*flags.runs)
    print(json.dumps(found) if flags.json else printable(_report(found)))
    return GOOD


def compare_runs(a: Path, b: Path) -> dict[str, Any]:
    """Return the spikes of both and the verdict, the first step whose loss differs, and what differs in the run files.

    Raises UsageError for logs that cannot be read, or that share no step.
    """
    logs = read_log(a).final(), read_log(b).final()
    tell_notes(note for log in logs for note in log.notes)
    both, losses = _common(*logs)
    if not len(both):
        raise UsageError(f"{a} and {b} have no step in common")
    spikes = [[step for step in _spikes(log) if step in set(both.tolist())] for log in logs]
    together = coincident(spikes[0], spikes[1], len(both))
    same_order = _same_order(a, b)
    differs = np.flatnonzero(losses[0] != losses[1])
    return {
        "a": str(a),
        "b": str(b),
        "common_steps": len(both),
        "same_data_order": same_order,
        "spikes_a": spikes[0],
        "spikes_b": spikes[1],
        "shared": list(together.shared),
        "chance": together.chance,
        "verdict": _verdict(together.verdict, same_order),
        "first_different_step": int(both[differs[0]]) if len(differs) else None,
        "first_difference": float(losses[1][differs[0]] - losses[0][differs[0]]) if len(differs) else None,
        "differences": list(_differences(a, b)),
    }


def _spikes(log: Log) -> list[int]:
    return sorted({e.onset_step for e in scan(log.steps, log.columns) if KINDS[e.kind].is_spike and e.delta > 0})


def _common(a: Log, b: Log) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Return (steps that both have, the losses of each there)."""
    tables = [dict(zip(log.steps.tolist(), log.columns["loss"].tolist(), strict=True)) for log in (a, b)]
    both = np.array(sorted(tables[0].keys() & tables[1].keys()), dtype=np.int64)
    return both, (np.array([tables[0][s] for s in both.tolist()]), np.array([tables[1][s] for s in both.tolist()]))


def _same_order(a: Path, b: Path) -> bool | None:
    """Return whether both recipes read the same sequences at the same steps; None where one is only a log."""
    recipes = [_json(folder / "recipe.json") for folder in (a, b)]
    if None in recipes:
        return None
    return all(_of_order(recipes[0], key) == _of_order(recipes[1], key) for key in DATA_ORDER)


def _of_order(recipe: dict[str, Any], key: str) -> Any:
    """Return a field of the recipe, without micro_seqs: it spreads the batch over ranks and changes none of it."""
    value = recipe.get(key)
    return {k: v for k, v in value.items() if k != "micro_seqs"} if isinstance(value, dict) and key == "batch" else value


def _verdict(coincidence: str, same_order: bool | None) -> str:
    if coincidence == "data" or same_order is not False:
        return coincidence
    return "cannot tell: the runs read their data in different orders"


def _differences(a: Path, b: Path) -> Iterator[dict[str, Any]]:
    """Yield every field of the run files that differs, by its path."""
    for name in FILES:
        contents = [_json(folder / name) for folder in (a, b)]
        if None in contents:
            continue
        if name == "run.json":
            contents = [_newest_start(folder / name, content) for folder, content in zip((a, b), contents, strict=True)]
        flat = [dict(_flatten(content, "")) for content in contents]
        for path in sorted(flat[0].keys() | flat[1].keys()):
            values = [f.get(path, ABSENT) for f in flat]
            if values[0] != values[1] and path.split(".")[0] not in OF_EVERY_START:
                yield {"file": name, "field": path, "a": values[0], "b": values[1]}
    newest = [chain[-1].facts for chain in (read_chain(a)[0], read_chain(b)[0]) if chain]
    if len(newest) == 2:
        for path in changed_facts(*newest):
            if path.startswith(OF_THE_RECORD):
                yield {"file": "segments", "field": path, **dict(zip("ab", (f.get(path, ABSENT) for f in newest), strict=True))}


def _newest_start(path: Path, run: dict[str, Any]) -> dict[str, Any]:
    with laid_out(path):
        return dict(run["starts"][-1])


def _flatten(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value


def _json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def _report(found: dict[str, Any]) -> str:
    order = {True: "one order of data", False: "different orders of data", None: "unknown orders of data"}[
        found["same_data_order"]
    ]
    lines = [f"{found['common_steps']} common steps, {order}"]
    if found["first_different_step"] is None:
        lines.append("the losses are equal at every common step")
    else:
        lines.append(f"the losses part at step {found['first_different_step']} (by {found['first_difference']:+.3g})")
    lines.append(f"spikes: {len(found['spikes_a'])} and {len(found['spikes_b'])}, {len(found['shared'])} at the same steps")
    if found["shared"]:
        steps = ", ".join(map(str, found["shared"][:SHOWN])) + (" ..." if len(found["shared"]) > SHOWN else "")
        lines.append(f"  common at {steps}; by chance with probability {found['chance']:.1e}")
    meaning = {
        "data": "data: the same batches are hard in both",
        "dynamics": "dynamics: the same batches are hard in one only",
    }
    lines.append(f"verdict: {meaning.get(found['verdict'], found['verdict'])}")
    rows = [[d["file"], d["field"], d["a"], d["b"]] for d in found["differences"][:SHOWN]]
    if rows:
        lines += ["", table(rows, ["file", "field", "first", "second"])]
    if len(found["differences"]) > SHOWN:
        lines.append(f"... and {len(found['differences']) - SHOWN} more")
    return "\n".join(lines)


@dataclass(frozen=True)
class Coincidence:
    """The steps at which two runs spiked, compared."""

    shared: tuple[int, ...]
    only_a: tuple[int, ...]
    only_b: tuple[int, ...]
    chance: float  # probability of as many shared steps or more if spikes fell anywhere
    verdict: str  # data, dynamics, cannot tell


def coincident(steps_a: Collection[int], steps_b: Collection[int], positions: int) -> Coincidence:
    """Compare the steps at which two runs spiked. positions: the number of logged steps that both runs have."""
    a, b = set(steps_a), set(steps_b)
    shared, fewer = a & b, min(len(a), len(b))
    mean = len(a) * len(b) / max(positions, 1)  # Poisson: spikes are few among the steps
    below = sum(math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(len(shared)))
    chance = max(1.0 - below, 0.0) if shared else 1.0
    if shared and len(shared) >= MOST * fewer and chance < CHANCE:
        verdict = "data"
    elif fewer >= FEW and len(shared) <= HARDLY_ANY * fewer:
        verdict = "dynamics"
    else:
        verdict = "cannot tell"
    return Coincidence(tuple(sorted(shared)), tuple(sorted(a - b)), tuple(sorted(b - a)), chance, verdict)
