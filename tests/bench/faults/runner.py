"""Runs one trial: the command with its faults, the damage, the same command again, and the judgement after each."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from recipes.common.run_dir.heartbeat import FOLDER as HEARTBEATS
from tests.bench.faults.blows import deal, lose_heartbeats
from tests.bench.faults.harms import KEPT, do_harm
from tests.bench.faults.jobs import STEPS, start_trial, write_recipe
from tests.bench.faults.judge import Curve, curve, last_problems, sealed_problems, stop_problems
from tests.bench.faults.plans import Blow, FaultTrial
from tests.bench.faults.planted import Injector, PlantedFault, wrap_calls
from tests.support.forked_jobs import Prepare

LIMIT_SECONDS = 200.0  # for a command; a hang is found within 12 s, in a start or a save within 40
GONE_SECONDS = 20.0  # after the supervisor's end, for its ranks' (15 are promised)
_POLL_SECONDS = 0.01
_PR_SET_CHILD_SUBREAPER = 36

Counts = dict[str, dict[str, int]]  # process -> "calls place" -> how many an undisturbed run makes


@dataclass(frozen=True)
class Reference:
    """An undisturbed run of a recipe."""

    recipe: Path
    curve: Curve  # what every step's checkpoint holds
    counts: Counts


@dataclass
class Command:
    """What became of one command line."""

    exit: int | None  # of the first job; None: it did not end
    others: list[tuple[bool, int]]  # (of the other recipe, exit code) of second jobs
    seconds: float
    missed: list[str]  # blows that came too late
    problems: list[str] = field(default_factory=list)


def counted(process: str, injector: Injector, folder: Path) -> None:
    """Write how many calls this process made when it ends."""
    end = os._exit

    def write_and_end(code: int) -> None:
        text = json.dumps({f"{kind} {place}": number for (kind, place), number in injector.counts.items()})
        (folder / f"{process}.json").write_text(text)
        end(code)

    os._exit = write_and_end


def make_reference(folder: Path, ranks: int, pipelined: bool, lr: float) -> Reference:
    """Run a recipe to its end, saving every step, and count the calls."""
    counts, run_dir, output = folder / "counts", folder / "run", folder / "run.out"
    counts.mkdir(parents=True)
    recipe = write_recipe(folder / "recipe", pipelined=pipelined, lr=lr)
    whole = write_recipe(folder / "all", pipelined=pipelined, lr=lr, every=1, keep=STEPS)

    def count(process: str) -> None:
        injector = Injector(run_dir, [])
        wrap_calls(injector)
        counted(process, injector, counts)

    prepare = Prepare(lambda: count("supervisor"), lambda attempt, rank: count(f"rank {rank}"))
    ended = run_command(run_dir, whole, whole, ranks, prepare, (), output)
    assert ended.exit == 0 and not ended.problems, output.read_text()
    found = {path.stem: json.loads(path.read_text()) for path in counts.iterdir()}
    return Reference(recipe, curve(run_dir), found)


def run_trial(trial: FaultTrial, reference: Reference, other: Reference | None, folder: Path) -> dict[str, Any]:
    """Run a trial in `folder`. Returns its line of the log; "violations" is empty where every invariant held.

    other: of the second job, where that has another learning rate.
    """
    run_dir = folder / "run"
    folder.mkdir(parents=True)
    (folder / "trial.json").write_text(json.dumps(asdict(trial), indent=1))
    began, commands, violations = os.times(), [], []
    harmed: dict[Path, tuple[int, int]] = {}
    curves = [each.curve for each in (reference, other) if each is not None]
    other_recipe = (other or reference).recipe

    def command(faults: tuple[PlantedFault, ...], blows: tuple[Blow, ...], output: str) -> Command:
        number = len(commands) + 1
        prepare = Prepare(
            lambda: plant(faults, "supervisor", 1, run_dir, reference.counts),
            lambda attempt, rank: plant(faults, f"rank {rank}", attempt, run_dir, reference.counts),
            closed_output=output == "closed",
        )
        ended = run_command(
            run_dir, reference.recipe, other_recipe, trial.ranks, prepare, blows, folder / f"{number}.out", output
        )
        commands.append(ended)
        found = ended.problems + sealed_problems(run_dir, curves, harmed)
        if 0 in (ended.exit, *(code for _, code in ended.others)):
            found += last_problems(run_dir, curves)
        violations.extend(f"command {number}: {problem}" for problem in found)
        return ended

    first = command(trial.inside, trial.blows, trial.output)
    if trial.harmless() and (first.exit, _attempts(run_dir)) != (0, 1):
        violations.append(f"command 1: exit {first.exit}, {_attempts(run_dir)} attempts, but what happened was harmless")
    if first.exit == 75 and [blow.target for blow in trial.blows] == ["supervisor"] and not trial.broken():
        violations += [f"command 1: {p}" for p in stop_problems(run_dir, (folder / "1.out").read_text(errors="replace"))]
    for harm in trial.harms:
        harmed |= do_harm(harm, run_dir)
    kept = (run_dir / KEPT).exists()
    if trial.again:
        command(trial.again, (), "file")
    if first.exit != 0 or trial.harms or trial.again or trial.number % 4 == 0:
        last = command((), (), "file")
        if last.exit != 0:
            violations.append(f"command {len(commands)}: exit {last.exit}: the next start needs a hand")
    if kept and not (run_dir / KEPT).exists():
        violations.append(f"{KEPT} was deleted, which the run had not written")
    ended = os.times()
    used = sum(getattr(ended, name) - getattr(began, name) for name in ("children_user", "children_system", "user", "system"))
    return {
        "trial": trial.number,
        "seed": trial.seed,
        "kind": trial.kind,
        "ranks": trial.ranks,
        "commands": [{"exit": c.exit, "others": c.others, "seconds": round(c.seconds, 2), "missed": c.missed} for c in commands],
        "attempts": _attempts(run_dir),
        "happened": _happened(run_dir),
        "cpu_seconds": round(used, 2),
        "violations": violations,
    }


def _attempts(run_dir: Path) -> int:
    with contextlib.suppress(OSError):
        return (run_dir / "logs/attempts.jsonl").read_bytes().count(b'"event": "start"')
    return 0


def _happened(run_dir: Path) -> dict[str, int]:
    """Return what the planted faults did, and how often."""
    with contextlib.suppress(OSError):
        return dict(Counter(Path(f"{run_dir}.happened").read_text().splitlines()).most_common(4))
    return {}


def plant(faults: tuple[PlantedFault, ...], process: str, attempt: int, run_dir: Path, counts: Counts) -> None:
    """Plant in this process what concerns it."""
    mine = []
    for fault in faults:
        names = (process, "every rank") if process.startswith("rank") else (process,)
        if fault.process in names and (attempt == 1 or fault.every_attempt):
            mine.append(_place(fault, counts.get(process, {})))
    if mine:
        wrap_calls(Injector(run_dir, mine))


def _place(fault: PlantedFault, counts: Mapping[str, int]) -> tuple[PlantedFault, int]:
    """Return the fault, and at which of its calls it happens. What no undisturbed run does is widened to what one does."""
    for calls, place in ((fault.calls, fault.place), ("any", fault.place), (fault.calls, "any"), ("any", "any")):
        of_these = (n for k, n in counts.items() if calls in ("any", k.split()[0]) and place in ("any", k.split()[1]))
        if total := sum(of_these):
            break
    return replace(fault, calls=calls, place=place), int(fault.at * total)


def run_command(
    run_dir: Path,
    recipe: Path,
    other_recipe: Path,
    ranks: int,
    prepare: Prepare,
    blows: tuple[Blow, ...],
    output: Path,
    how: str = "file",
) -> Command:
    """Start the job, deal the blows, and wait until every process of it is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    began, since = time.monotonic(), time.time()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    reader, writer = os.pipe() if "pipe" in how else (-1, file)
    if reader >= 0:
        os.set_blocking(reader, False)
    if how == "cut pipe":
        os.close(reader)
        reader = -1
    first = start_trial(recipe, ranks, run_dir, writer, prepare)
    if writer != file:
        os.close(writer)
    running: dict[int, bool] = {first: False}  # process -> of the other recipe
    ended: dict[int, int] = {}
    due = {blow: (began + blow.seconds if blow.step is None else None) for blow in blows}
    continued: list[tuple[float, Callable[[], None]]] = []
    problems, killed = [], False
    while running.keys() - ended.keys():
        _reap(ended, running)
        now = time.monotonic()
        if reader >= 0:
            reader = _read(reader, file)
        for blow in [blow for blow in due if due[blow] is None and _step(run_dir, since) >= (blow.step or 0)]:
            due[blow] = now + blow.seconds
        for blow in [blow for blow, when in due.items() if when is not None and when <= now]:
            del due[blow]
            if blow.what == "second job":
                words = (other_recipe if blow.other else recipe, ranks, run_dir, file, Prepare())
                running[start_trial(*words)] = blow.other
            elif blow.what == "close pipe":
                reader = _close(reader)
            elif blow.what == "heartbeats":
                lose_heartbeats(run_dir, blow.target)
                if blow.pause > 1:
                    due[Blow(**{**asdict(blow), "pause": blow.pause - 1})] = now + 0.1
            else:
                continued += [(now + (blow.pause or 25.0), undo) for undo in deal(blow, first, bool(blow.pause))]
        for entry in [entry for entry in continued if entry[0] <= now]:
            continued.remove(entry)
            entry[1]()
        if now - began > LIMIT_SECONDS and not killed:
            problems.append(f"did not end in {LIMIT_SECONDS:.0f} s: {_describe(os.getpid())}")
            killed = True
            _kill_all()
        time.sleep(_POLL_SECONDS)
    problems += _wait_for_the_rest(ended, running, [undo for _, undo in continued])
    if reader >= 0:
        os.close(_read(reader, file) if reader >= 0 else reader)
    os.close(file)
    others = [(other, ended[pid]) for pid, other in running.items() if pid != first]
    missed = [f"{blow.what} {blow.target}" for blow in due]
    return Command(None if killed else ended[first], others, time.monotonic() - began, missed, problems)


def _reap(ended: dict[int, int], running: dict[int, bool]) -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            if pid in running:
                ended[pid] = os.waitstatus_to_exitcode(status)


def _step(run_dir: Path, since: float) -> int:
    """Return rank 0's step in this command; -1 before it has begun."""
    path = run_dir / HEARTBEATS / "rank_00000.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if path.stat().st_mtime >= since:
            return json.loads(path.read_bytes())["step"]
    return -1


def _read(reader: int, file: int) -> int:
    with contextlib.suppress(BlockingIOError):
        while text := os.read(reader, 65536):
            os.write(file, text)
    return reader


def _close(reader: int) -> int:
    if reader >= 0:
        os.close(reader)
    return -1


def _wait_for_the_rest(ended: dict[int, int], running: dict[int, bool], undo: list[Callable[[], None]]) -> list[str]:
    """Wait until no process is left. Returns a problem where some outlive what is promised, and kills them."""
    end, killed = time.monotonic() + GONE_SECONDS, []
    while left := _left():
        _reap(ended, running)
        if time.monotonic() > end:
            if undo:  # processes that stand still by our doing
                for each in undo:
                    each()
                undo, end = [], time.monotonic() + GONE_SECONDS
                continue
            if killed:
                break
            killed = [f"processes outlived the supervisor by {GONE_SECONDS:.0f} s: {_describe(os.getpid())}"]
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            end = time.monotonic() + GONE_SECONDS
        time.sleep(_POLL_SECONDS)
    return killed


def _left() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _describe(pid: int) -> str:
    lines = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            lines.append(f"{process.pid} (parent {process.ppid()}, {process.status()}) {' '.join(process.cmdline()[-4:])[:80]}")
    return "; ".join(lines)


def _kill_all() -> None:
    for process in _left():
        with contextlib.suppress(psutil.Error):
            process.kill()
