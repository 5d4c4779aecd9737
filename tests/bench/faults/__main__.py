"""Breaks small supervised runs at random and checks, after each, that nothing was lost and nothing was claimed falsely.

    python -m tests.bench.faults --trials 1000 --seed 1 --log faults.jsonl      # --resume: go on with that log
    python -m tests.bench.faults --pick 37 --seed 1 --keep                      # repeat trial 37, and keep its folder

A trial is a run of 16 steps on 1, 2 or 4 ranks under tools/supervise, with faults drawn from its seed: `kill -9` of any process
between any two calls to the file system or at any moment, SIGSTOP, errors of any call (EIO, ENOSPC, ...), once or for good,
MemoryError and memory limits, a second job in the folder, clocks that jump, heartbeats that vanish, output that nobody reads,
signals, files cut, flipped or removed between two starts. Then the same command is given again. What must hold each time:

1. Exit 0 means that the last state is on disk, bitwise that of an undisturbed run.
2. Everything sealed verifies, is of one attempt, and is bitwise that step of an undisturbed run.
3. The next start needs no hand: the same command ends with exit 0. What only looks like a fault does not end the run at all.
4. No process outlives its supervisor by more than 20 s, and every command ends.

Exit 1 when one does not hold; the trial's folder is kept then, with its output, and the command that repeats it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[3])

os.environ.update(
    DS_ACCELERATOR="cpu",
    OMP_NUM_THREADS="1",
    WANDB_MODE="disabled",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_VERBOSITY="error",
    TOKENIZERS_PARALLELISM="false",
)

import argparse
import json
import pickle
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

from recipes.common.record.source_code import git_state
from tests.bench.faults.plans import KINDS, FaultTrial, draw_trial
from tests.bench.faults.runner import Reference, make_reference, run_trial
from tools.common.console import FAILED, GOOD, UsageError, exit_code, table

LR, OTHER_LR = 4e-3, 1e-3


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.faults", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trials", type=int, default=20, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all trials; each is drawn from it and its number (default: 0)")
    parser.add_argument("--pick", type=int, nargs="+", metavar="N", help="these trials alone, by number")
    parser.add_argument("--only", choices=sorted(KINDS), help="one kind of fault (default: all)")
    parser.add_argument("--ranks", type=int, choices=(1, 2, 4), help="trials on so many ranks alone (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the runs lie (default: a temporary folder)")
    parser.add_argument("--log", type=Path, help="append a JSON line for each trial")
    parser.add_argument("--resume", action="store_true", help="leave out the trials that --log holds already")
    parser.add_argument("--keep", action="store_true", help="keep every trial's folder, not only those of violations")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, nothing else there")
    return parser.parse_args(argv)


def run(flags: argparse.Namespace) -> int:
    for name in ("trials", "jobs"):
        if getattr(flags, name) < 1:
            raise UsageError(f"--{name}={getattr(flags, name)}: must be 1 or more")
    if flags.resume and not flags.log:
        raise UsageError("--resume: needs --log FILE, which says what is done")
    done = read_log(flags.log, flags.seed, flags.only) if flags.resume else []
    numbers = flags.pick or range(flags.trials)
    trials = [draw_trial(number, flags.seed, flags.only) for number in numbers]
    had = {record["trial"] for record in done}
    trials = [t for t in trials if t.number not in had and flags.ranks in (None, t.ranks)]
    folder = flags.folder or Path(tempfile.mkdtemp(prefix="trifold-faults-"))
    git = git_state()
    records = [record for record in done if record["trial"] in numbers]

    def note(record: dict[str, Any]) -> None:
        record |= {"commit": git["commit"], "only": flags.only}
        records.append(record)
        if flags.log:
            with flags.log.open("a") as file:
                file.write(json.dumps(record) + "\n")
        codes = " ".join(str(command["exit"]) for command in record["commands"])
        what = f"trial {record['trial']} ({record['kind']}, {record['ranks']} ranks): exits {codes}, {record['cpu_seconds']} s"
        print(what, file=sys.stderr, flush=True)
        for line in record["violations"]:
            print(
                f"  VIOLATION {line}\n  in {folder}/trial_{record['trial']}; again: {again(record)}", file=sys.stderr, flush=True
            )

    run_all(trials, folder, flags.jobs, note, keep=flags.keep)
    if not flags.folder and not flags.keep and not any(record["violations"] for record in records):
        shutil.rmtree(folder)
    return report(records, git, flags.json)


def again(record: dict[str, Any]) -> str:
    only = f" --only {record['only']}" if record.get("only") else ""
    return f"python -m tests.bench.faults --pick {record['trial']} --seed {record['seed']}{only} --keep"


def read_log(path: Path, seed: int, only: str | None) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [r for r in map(json.loads, lines) if r["seed"] == seed and r.get("only") == only]


def run_all(
    trials: list[FaultTrial], folder: Path, jobs: int, note: Callable[[dict[str, Any]], None], *, keep: bool = False
) -> None:
    """Run trials, `jobs` at a time, each in a process of its own; `note` gets each one's record."""
    references: dict[tuple[int, bool, float], Reference] = {}

    def reference(trial: FaultTrial, lr: float) -> Reference:
        key = (trial.ranks, trial.pipelined or trial.ranks != 2, lr)
        if key not in references:
            where = folder / "reference_{}_{}_{}".format(*key)
            shutil.rmtree(where, ignore_errors=True)
            references[key] = _result(_fork(make_reference, where, *key)[0])
        return references[key]

    running: dict[int, tuple[FaultTrial, int]] = {}
    waiting = list(trials)
    while waiting or running:
        while waiting and len(running) < jobs:
            trial = waiting.pop(0)
            other = reference(trial, OTHER_LR) if any(blow.other for blow in trial.blows) else None
            reader, pid = _fork(_trial, trial, reference(trial, LR), other, folder / f"trial_{trial.number}", keep)
            running[pid] = trial, reader
        pid, reader = _first_done(running)
        record = _result(reader)
        del running[pid]
        note(record)


def _trial(trial: FaultTrial, reference: Reference, other: Reference | None, folder: Path, keep: bool) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    try:
        record = run_trial(trial, reference, other, folder)
    except Exception:  # the bench itself: counted as a violation, so that nobody overlooks it
        fields = {"trial": trial.number, "seed": trial.seed, "kind": trial.kind, "ranks": trial.ranks, "commands": []}
        record = {**fields, "cpu_seconds": 0.0, "violations": [f"the bench failed: {traceback.format_exc()}"]}
    if not keep and not record["violations"]:
        shutil.rmtree(folder, ignore_errors=True)
    return record


def _fork(work: Callable[..., Any], *args: Any) -> tuple[int, int]:
    """Call work(*args) in a fork. Returns (where its result arrives, its process)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return reader, pid
    try:
        result = work(*args)
    except BaseException:
        result = RuntimeError(traceback.format_exc())
    with os.fdopen(writer, "wb") as file:
        pickle.dump(result, file)
    os._exit(0)


def _first_done(running: dict[int, tuple[FaultTrial, int]]) -> tuple[int, int]:
    import select

    readers = {reader: pid for pid, (_, reader) in running.items()}
    ready = select.select(list(readers), [], [])[0][0]
    return readers[ready], ready


def _result(reader: int) -> Any:
    with os.fdopen(reader, "rb") as file:
        result = pickle.load(file)  # our own child's bytes
    if isinstance(result, Exception):
        raise result
    return result


def report(records: list[dict[str, Any]], git: dict[str, Any], as_json: bool) -> int:
    """Print how many trials of each kind ran and what broke. Returns the exit code."""
    broken = [record for record in records if record["violations"]]
    if as_json:
        seconds = sum(record["cpu_seconds"] for record in records)
        kinds = Counter(record["kind"] for record in records)
        counts = {"trials": len(records), "kinds": kinds, "cpu_seconds": round(seconds, 1)}
        print(json.dumps({**counts, "violations": broken, "git": git}))
        return FAILED if broken else GOOD
    rows = []
    for kind in sorted({record["kind"] for record in records}):
        of_kind = [record for record in records if record["kind"] == kind]
        exits = Counter(str(command["exit"]) for record in of_kind for command in record["commands"][:1])
        codes = ", ".join(f"{code}: {count}" for code, count in exits.most_common())
        cpu = sum(record["cpu_seconds"] for record in of_kind) / len(of_kind)
        rows.append([kind, len(of_kind), codes, f"{cpu:.1f} s", sum(bool(record["violations"]) for record in of_kind)])
    print(table(rows, ["kind", "trials", "exits of the broken command", "CPU time", "violations"]))
    print(f"{len(records)} trials, {len(broken)} with a violation; commit {git['commit']}{' (changed)' if git['dirty'] else ''}, "
          f"{time.strftime('%Y-%m-%d')}")  # fmt: skip
    return FAILED if broken else GOOD


def main(argv: list[str] | None = None) -> int:
    flags = parse_args(argv)
    return exit_code(lambda: run(flags))


if __name__ == "__main__":
    sys.exit(main())
