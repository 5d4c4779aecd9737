"""Plants wrong lines in the code that shapes numbers, one at a time, and counts how many `verify` and the tests find.

    python -m tests.bench.mutants --count 100 --seed 1

Draws the lines at random (`mutations`: a collective left out or doubled, a sign, a bound, a scale, a swapped branch, a hook too
few, a wrong group, ...), plants each in a copy of the tree, and has it judged by `verify` in a dozen layouts and then by tests:
those that call the function, the module's own first, then the cheapest. The first that finds it ends it. A line that nothing
finds is a hole. One of which harmless.json says why it changes no number is not planted. Exits 1 below 98 of 100 found.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import argparse
import compileall
import contextlib
import ctypes
import importlib
import json
import multiprocessing
import os
import py_compile
import shutil
import signal
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import psutil

from tests.bench.mutants import judges
from tests.bench.mutants.mutations import Mutation, draw
from tools.common.console import FAILED, GOOD, UsageError, exit_code, quiet_transformers

ROOT = Path(__file__).resolve().parents[3]
COPIED = ("recipes", "tools", "tests", "ds_configs", "launch", "pyproject.toml", "README.md", "requirements.txt")
HARMLESS = Path(__file__).parent / "harmless.json"
WANTED = 0.98
HANGS = "hangs"
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
STILL_SECONDS = 30.0  # in which a judge's processes want no processor: they wait for each other, and the line is found
STILL_SHARE = 0.2  # of the time: a rank that is done looks for its parent again and again
ENDLESS_SECONDS = 60.0  # of processor time, and ten times what the judge took on the tree as it is
TEST_SECONDS = 60.0  # of tests for one line, beside those of its own module


@dataclass
class Baseline:
    """What each judge takes and calls on the tree as it is."""

    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # judge -> "file:function", by qualified names

    def judges_of(self, mutation: Mutation) -> list[str]:
        """Return the judges that call the function of a wrong line, the cheapest first, then all other tests of their files.

        What tests share, a start of ranks, has run for the first of them: only that one was seen to call anything.
        """
        function = f"{mutation.file}:{mutation.function}"
        able = [name for name in self.seconds if not mutation.function or function in self.calls[name]]
        files = {name.partition("::")[0] for name in able if "::" in name}
        shared = [name for name in self.seconds if name.partition("::")[0] in files and name not in able]
        return [name for names in (able, shared) for name in sorted(names, key=self.seconds.__getitem__)]


@dataclass(frozen=True)
class Verdict:
    number: int
    mutation: Mutation
    found_by: str | None  # the judge
    said: str
    seconds: float
    harmless: str | None  # why it changes no number


def main(argv: list[str] | None = None) -> int:
    flags = _parse_flags(argv)
    return exit_code(lambda: _run(flags))


def _run(flags: argparse.Namespace) -> int:
    if flags.count < 1:
        raise UsageError(f"--count={flags.count}: must be 1 or more")
    quiet_transformers()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing is left behind
    harmless = {tuple(entry["key"]): entry["why"] for entry in json.loads(HARMLESS.read_text())}
    drawn = list(enumerate(draw(ROOT, flags.count, flags.seed)))
    drawn = [(number, mutation) for number, mutation in drawn if not flags.only or number in flags.only]
    with _copy_of_the_tree() as copy:
        _warm_up()
        baseline = _baseline(copy, flags)
        verdicts = []
        for number, mutation in drawn:
            verdict = _judge(copy, baseline, number, mutation, flags.test_seconds, harmless)
            verdicts.append(verdict)
            if not flags.json:
                print(_line(verdict), flush=True)
    return _report(verdicts, flags)


def _judge(
    copy: Path, baseline: Baseline, number: int, mutation: Mutation, test_seconds: float, harmless: dict[tuple, str]
) -> Verdict:
    if mutation.key in harmless:
        return Verdict(number, mutation, None, "", 0.0, harmless[mutation.key])
    file, started = copy / mutation.file, time.perf_counter()
    source = file.read_bytes()
    able = baseline.judges_of(mutation)
    gates = [name for name in able if name.startswith("verify ")]
    own = f"tests/common/{mutation.file.removeprefix('recipes/common/').replace('/', '/test_')}::"
    tests = sorted((name for name in able if name not in gates), key=lambda name: not name.startswith(own))
    tests = list(_within(tests, own, test_seconds, baseline))
    found, said = None, ""
    file.write_bytes(mutation.planted(source))
    try:
        for work, names in (("run_gates", gates), ("run_tests", tests)):
            for name, passed, message, _ in _said(copy, work, names, baseline) if names else ():
                if name == judges.PYTEST and message == judges.NO_SUCH_TEST:
                    raise UsageError("--baseline names tests that are no more: write a new one")
                if not passed:
                    found, said = name, message
                    break
            if found:
                break
    finally:
        file.write_bytes(source)
    return Verdict(number, mutation, found, said, time.perf_counter() - started, None)


def _within(tests: list[str], own: str, seconds: float, baseline: Baseline) -> Iterator[str]:
    for name in tests:
        if not name.startswith(own):
            seconds -= baseline.seconds[name]
        if seconds > 0:
            yield name


def _said(copy: Path, work: str, names: list[str], baseline: Baseline | None, calls: Path | None = None) -> Iterator[judges.Said]:
    """Run judges in a forked child that imports the copy, and yield what each says. One that hangs finds something wrong."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(copy, work, names, send, calls))
    child.start()
    send.close()
    left = list(names)
    try:
        while True:
            longest = max((baseline.seconds.get(name, 0.0) for name in left), default=0.0) if baseline else 60.0
            said = _next(receive, child.pid, ENDLESS_SECONDS + 10 * longest)
            if said is None:
                return
            if said == HANGS:
                yield left[0] if left else work, False, HANGS, 0.0
                return
            left = [name for name in left if name != said[0]]
            yield said
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.join()


def _next(receive: Connection, pid: int, most_seconds: float) -> judges.Said | str | None:
    """Return what the child says next, HANGS, or None when it has said all.

    Not told by the clock, because the machine may be loaded: it hangs if its processes neither compute nor wait for a processor.
    """
    began = still = None
    while not receive.poll(2.0):
        used, queued = _seconds(pid)
        began = used if began is None else min(began, used)
        if still is None or abs(used + queued - still[0]) > STILL_SHARE * (time.monotonic() - still[1]) + 0.1:
            still = used + queued, time.monotonic()
        if time.monotonic() - still[1] > STILL_SECONDS or used - began > most_seconds:
            return HANGS
    try:
        return receive.recv()
    except EOFError:
        return None


def _seconds(pid: int) -> tuple[float, float]:
    """Add up the seconds that a process and all under it have computed, and have been ready to; ended ones count no more."""
    used = queued = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in (parent := psutil.Process(pid), *parent.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess, OSError):
                used += sum(process.cpu_times()[:2])
                queued += int(Path(f"/proc/{process.pid}/schedstat").read_text().split()[1]) / 1e9
    return used, queued


def _child(copy: Path, work: str, names: list[str], send: Connection, calls: Path | None) -> None:
    """Leave the parent's session, forget the project's modules, and import them from the copy."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("recipes", "tools", "tests")]:
        del sys.modules[name]
    sys.path[:] = [str(copy), *(path for path in sys.path if path not in ("", str(ROOT)))]
    os.chdir(copy)
    try:
        getattr(importlib.import_module("tests.bench.mutants.judges"), work)(names, send.send, calls)
    except BaseException as error:
        send.send((names[0], False, f"cannot be imported: {type(error).__name__}: {error}", 0.0))
    send.send(None)
    os._exit(0)


def _baseline(copy: Path, flags: argparse.Namespace) -> Baseline:
    """Run the judges that a stored baseline lacks on the tree as it is. Raises UsageError where one finds something wrong."""
    baseline, calls = Baseline(), copy / "calls.txt"
    if flags.baseline and flags.baseline.is_file():
        stored = json.loads(flags.baseline.read_text())
        baseline = Baseline(stored["seconds"], defaultdict(set, {name: set(found) for name, found in stored["calls"].items()}))
    gates = [gate.name for gate in judges.GATES][: flags.gates]
    tests = [path for path in flags.tests if not any(name.startswith(path) for name in baseline.seconds)]
    for work, names in (("run_gates", [name for name in gates if name not in baseline.seconds]), ("run_tests", tests)):
        for name, passed, message, seconds in _said(copy, work, names, None, calls) if names else ():
            if not passed:
                raise UsageError(f"{name} fails without any planted line: {message}")
            baseline.seconds[name] = seconds
            print(f"as it is, {seconds:.1f} s: {name}", file=sys.stderr, flush=True)
    for line in calls.read_text().splitlines() if calls.is_file() else ():
        judge, function = line.split("\t")
        baseline.calls[judge].add(function)
    if flags.baseline:
        stored = {"seconds": baseline.seconds, "calls": {name: sorted(found) for name, found in baseline.calls.items()}}
        flags.baseline.write_text(json.dumps(stored))
    return baseline


@contextlib.contextmanager
def _copy_of_the_tree() -> Iterator[Path]:
    """Copy what judges read, compiled by content: a planted line has its file's size and second."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder).resolve()
        for name in COPIED:
            path, ignore = ROOT / name, shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, copy / name, ignore=ignore) if path.is_dir() else shutil.copy2(path, copy / name)
        compileall.compile_dir(copy, quiet=1, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
        sys.dont_write_bytecode = True
        os.environ.update(PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
        yield copy


def _warm_up() -> None:
    """Import in this process, once, what every child needs and none of its faults touches."""
    import torch.utils.tensorboard  # noqa: F401
    import wandb  # noqa: F401

    from recipes.common.engine.deepspeed_patches import patch_start

    with contextlib.redirect_stdout(sys.stderr):
        patch_start()
    for gate in judges.GATES:
        if gate.family:
            importlib.import_module(f"transformers.models.{gate.family}.modeling_{gate.family}")


def _line(verdict: Verdict) -> str:
    mutation = verdict.mutation
    fate = f"found by {verdict.found_by}: {verdict.said}" if verdict.found_by else "SURVIVES"
    fate = f"changes no number: {verdict.harmless}" if verdict.harmless else fate
    lines = [
        f"{verdict.number:>3} {verdict.seconds:5.1f} s  {mutation.kind:<21} {mutation.file}:{mutation.line} {mutation.function}",
        f"- {mutation.before}",
        f"+ {mutation.after}",
        fate[:160],
    ]
    return "\n      ".join(lines)


def _report(verdicts: list[Verdict], flags: argparse.Namespace) -> int:
    found = [v for v in verdicts if v.found_by]
    gate = sum(v.found_by.startswith("verify ") for v in found)
    harmless, missed = [v for v in verdicts if v.harmless], [v for v in verdicts if not v.found_by and not v.harmless]
    rate = len(found) / max(len(found) + len(missed), 1)
    kinds = Counter(v.mutation.kind for v in verdicts)
    if flags.json:
        survivors = [{"number": v.number, "key": v.mutation.key, "line": v.mutation.line} for v in missed]
        figures = {"planted": len(verdicts), "found": len(found), "by_verify": gate, "harmless": len(harmless), "rate": rate}
        print(json.dumps({"seed": flags.seed, **figures, "kinds": kinds, "survivors": survivors}))
    else:
        print(
            f"\nseed {flags.seed}: {len(verdicts)} wrong lines planted; {len(found)} found, {gate} by verify and "
            f"{len(found) - gate} by tests; {len(harmless)} change no number; {len(missed)} survive"
        )
        print(f"found of those that change a number: {100 * rate:.1f} % (wanted: {100 * WANTED:.0f} %)")
    return GOOD if rate >= WANTED else FAILED


def _parse_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100, help="wrong lines to draw (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the draw (default: %(default)s)")
    parser.add_argument("--only", type=int, nargs="*", default=[], metavar="N", help="of those drawn, plant these, by number")
    parser.add_argument("--gates", type=int, default=None, metavar="N", help="layouts of verify, the first N (default: all)")
    parser.add_argument("--tests", nargs="*", default=list(judges.TESTS), metavar="PATH", help="where the tests are")
    parser.add_argument(
        "--test-seconds", type=float, default=TEST_SECONDS, help="of other modules' tests for a line (default: %(default)s)"
    )
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="keep what judges take and call, or read it")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
