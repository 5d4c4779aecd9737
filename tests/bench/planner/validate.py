"""Predicts every measured row from the others of its table, and prints the errors.

Protocol. Nothing fitted beforehand is used: the models start from data sheets and formulas (`TERMS`), which are also judged by
themselves ("first principles": no row of any table is seen).
- Memory: each table (one software, GPU and precision) by leave-one-out: a row is predicted by a fit of its table's other rows.
  Rows whose memory their authors computed on paper (the note gives its parts) are no measurements and stay out.
- Out of memory: each such row by the fit of all rows of its table that report memory (they are other rows by nature); it is
  called when the peak, or its 90 % interval, reaches the GPU's memory. Rows that ran count as false calls when the peak does.
- Time, vTrain's tables: 5 folds drawn at random (seed 0) over rows. Rows of one layer shape may be on both sides; the error
  with whole shapes left out is printed too. Published rows: 5 folds over all of them, with one factor for each table.
- Regret: among the rows of one model, GPU count and global batch, the time of the row that its held-out prediction would choose
  over the time of the best, less one.
Rows whose time and TFLOP/s disagree by over a quarter are left out, and counted on stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.bench.planner.table_cases import memory_case, time_cases
from tests.bench.planner.table_fit import FIRST_PRINCIPLES, distinct, error_summary, fit_time, folds, held_out, take
from tests.bench.planner.tables import MeasuredRun, memory_table, read_rows
from tools.common.console import GOOD, UsageError, table
from tools.plan.memory_model import PRIOR, fit_memory, interval, peak_bytes

FOLDS = 5
PUBLISHED_EFFECT = 0.3  # width of a table's factor: software differs more than kernels do


def run(flags: argparse.Namespace) -> int:
    tables = {}
    for path in flags.csv:
        tables[path], silent = read_rows(path)
        if silent:
            _progress(f"{path.name}: {silent} rows left out: no GPU that is known, or no layout, sequence length or size")
    empty = [str(path) for path, rows in tables.items() if not any(r.seconds or r.memory or r.out_of_memory for r in rows)]
    if empty:
        raise UsageError(f"{', '.join(empty)}: no row says enough to be predicted")
    results = [result for path, rows in tables.items() for result in validate_file(path, rows)]
    if flags.json:
        print(json.dumps({"results": results}))
    else:
        print(_text(results))
    return GOOD


def validate_file(path: Path, rows: Sequence[MeasuredRun]) -> list[dict]:
    """Return a result for each table and quantity: errors, and every prediction."""
    timed = [row for row in rows if row.seconds]
    if disputed := sum(row.disputed for row in rows):
        _progress(f"{path.name}: {disputed} rows left out: their time and their TFLOP/s disagree by over a quarter")
    results = []
    if timed:
        published = len({row.table for row in timed}) > 1 or timed[0].table != path.stem
        results += _published_times(path, timed) if published else [_vtrain_times(path, timed)]
    groups = defaultdict(list)
    for row in rows:
        if (row.memory and not row.arithmetic) or row.out_of_memory:
            groups[memory_table(row)].append(row)
    return results + [_memory(path, name, group) for name, group in sorted(groups.items())]


def _vtrain_times(path: Path, rows: list[MeasuredRun]) -> dict:
    cases, seconds = time_cases(rows), np.array([row.seconds for row in rows])

    def predict(train: np.ndarray, test: np.ndarray) -> np.ndarray:
        return fit_time(take(cases, train), seconds[train]).predict(take(cases, test))

    _progress(f"{path.name}: {len(rows)} rows, {2 * FOLDS} fits")
    predicted = held_out(len(rows), FOLDS, predict) if len(rows) > 1 else FIRST_PRINCIPLES.predict(cases)
    shapes, place = distinct(cases.keys)
    unseen = np.empty(len(rows))
    for part in folds(len(shapes), FOLDS) if len(shapes) > 1 else []:
        test = np.isin(place, part)
        unseen[test] = predict(np.where(~test)[0], np.where(test)[0])
    result = _result(path, path.stem, "seconds", rows, seconds, FIRST_PRINCIPLES.predict(cases), predicted)
    if len(shapes) > 1:
        result["unseen_shapes"] = error_summary(unseen, seconds)
    result["regret"] = _regret(rows, seconds, predicted)
    return result


def _published_times(path: Path, rows: list[MeasuredRun]) -> list[dict]:
    cases, seconds = time_cases(rows, by_table=True), np.array([row.seconds for row in rows])

    def predict(train: np.ndarray, test: np.ndarray) -> np.ndarray:
        fit = fit_time(take(cases, train), seconds[train], effect_width=PUBLISHED_EFFECT)
        return fit.predict(take(cases, test))

    _progress(f"{path.name}: {len(rows)} rows with times, {FOLDS} fits")
    predicted = held_out(len(rows), FOLDS, predict) if len(rows) > 1 else FIRST_PRINCIPLES.predict(cases)
    first = FIRST_PRINCIPLES.predict(cases)
    results = []
    for name in sorted({row.table for row in rows}):
        of = [index for index, row in enumerate(rows) if row.table == name]
        results.append(_result(path, name, "seconds", [rows[i] for i in of], seconds[of], first[of], predicted[of]))
    return results


def _memory(path: Path, name: str, rows: list[MeasuredRun]) -> dict:
    ran, failed = [row for row in rows if row.memory], [row for row in rows if row.out_of_memory]
    cases, measured = [memory_case(row) for row in ran], np.array([row.memory for row in ran])

    def predict(train: np.ndarray, test: np.ndarray) -> np.ndarray:
        terms = fit_memory([cases[i] for i in train], measured[train]) if len(train) else PRIOR
        return peak_bytes(terms, [cases[i] for i in test])

    predicted = held_out(len(ran), len(ran), predict)
    result = _result(path, name, "bytes", ran, measured, peak_bytes(PRIOR, cases), predicted)
    terms = fit_memory(cases, measured) if ran else PRIOR
    spread = result["spread"] = float(np.percentile(np.abs(predicted / measured - 1), 90)) if len(ran) > 4 else None
    peaks = peak_bytes(terms, [memory_case(row) for row in failed])
    result["out_of_memory"] = [
        {
            "label": row.label,
            "predicted": peak,
            "capacity": row.device.memory,
            "called_by_peak": peak >= row.device.memory,
            "called": interval(peak, spread)[1] >= row.device.memory,
        }
        for row, peak in zip(failed, peaks.tolist(), strict=True)
    ]
    capacity = np.array([row.device.memory for row in ran])
    result["false_calls"] = int(((predicted >= capacity) & (measured < capacity)).sum())
    return result


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _result(
    path: Path, name: str, unit: str, rows: list[MeasuredRun], measured: np.ndarray, first: np.ndarray, predicted: np.ndarray
) -> dict:
    lines = [
        {"label": row.label, "measured": m, "first_principles": f, "predicted": p}
        for row, m, f, p in zip(rows, measured.tolist(), first.tolist(), predicted.tolist(), strict=True)
    ]
    result = {"file": str(path), "table": name, "unit": unit, "rows": lines}
    if rows:
        result["first_principles"], result["held_out"] = error_summary(first, measured), error_summary(predicted, measured)
    return result


def _regret(rows: list[MeasuredRun], seconds: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Return mean and worst regret over the groups of at least two rows, and how often the best is chosen."""
    groups = defaultdict(list)
    for index, row in enumerate(rows):
        groups[row.layers, row.hidden, row.heads, row.seq_len, row.gpus, row.global_seqs].append(index)
    regrets = [seconds[of][predicted[of].argmin()] / seconds[of].min() - 1 for of in groups.values() if len(of) > 1]
    if not regrets:
        return {"groups": 0}
    return {
        "groups": len(regrets),
        "mean": float(np.mean(regrets)),
        "worst": float(max(regrets)),
        "best_chosen": float(np.mean(np.array(regrets) == 0)),
    }


def _text(results: list[dict]) -> str:
    lines = []
    for unit, title in (("seconds", "seconds a step"), ("bytes", "memory")):
        of = [result for result in results if result["unit"] == unit and result["rows"]]
        if of:
            header = [title, "rows", "first principles", "held out", "median", "p90", "worst", "bias"]
            lines += [table([_cells(result) for result in of], header), _overall(of), ""]
    lines += _regrets(results)
    for result in results:
        if "unseen_shapes" in result:
            lines.append(f"{result['table']}: {result['unseen_shapes']['mean']:.1%} with whole layer shapes left out")
        for row in result.get("out_of_memory", []):
            verdict = "called" if row["called_by_peak"] else "called by its interval" if row["called"] else "MISSED"
            lines.append(
                f"out of memory: {row['label']}: {row['predicted'] / 2**30:.0f} of {row['capacity'] / 2**30:.0f} GiB, {verdict}"
            )
        if result.get("false_calls"):
            lines.append(f"{result['table']}: {result['false_calls']} rows that ran were called out of memory")
    return "\n".join(lines)


def _regrets(results: list[dict]) -> list[str]:
    of = [result for result in results if result.get("regret", {"groups": 0})["groups"]]
    lines = [
        f"{result['table']}: choosing the layout costs {regret['mean']:.2%} on average ({regret['groups']} groups, worst "
        f"{regret['worst']:.1%}, the best chosen in {regret['best_chosen']:.0%})"
        for result in of
        for regret in [result["regret"]]
    ]
    if len(of) > 1:
        count = sum(result["regret"]["groups"] for result in of)
        mean = sum(result["regret"]["mean"] * result["regret"]["groups"] for result in of) / count
        lines.append(f"all {count} groups: choosing the layout costs {mean:.2%} on average")
    return lines


def _cells(result: dict) -> list[object]:
    first, held = result["first_principles"], result["held_out"]
    shown = [f"{held[key]:.1%}" for key in ("mean", "median", "p90", "worst")]
    return [result["table"], held["rows"], f"{first['mean']:.1%}", *shown, f"{held['bias']:+.1%}"]


def _overall(results: list[dict]) -> str:
    count = sum(result["held_out"]["rows"] for result in results)
    first, held = (
        sum(result[kind]["mean"] * result["held_out"]["rows"] for result in results) / count
        for kind in ("first_principles", "held_out")
    )
    return f"all {count} rows: {first:.1%} by first principles, {held:.1%} held out"
