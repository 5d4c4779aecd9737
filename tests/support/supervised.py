"""Starts runs under tools/supervise for tests that break them, waits for steps, finds who is alive, compares the ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from recipes.common.recipe import ROOT
from recipes.common.run_dir.attempts import read_attempts, sealed_step
from recipes.common.run_dir.heartbeat import Beat, read_beats
from recipes.common.run_dir.metrics import read_metrics
from tests.support.forked_jobs import LAUNCHER, ForkedProcess, Prepare, start_job
from tests.support.launched import copy_repository
from tools.supervise import attempt

END_SECONDS = 15.0  # what is promised: from a rank's death to the last process's end, on every host
STEPS, EVERY = 16, 4
SETTINGS = """
from dataclasses import replace  # noqa
recipe = replace(recipe, steps={steps}, checkpoints=Checkpoints(every_steps={every}), evaluation=Evaluation())
recipe = replace(recipe, schedule=replace(recipe.schedule, warmup_steps=min({steps} - 1, 4)))
{extra}
"""


# a rank begins no step past the number in RUN_DIR.hold, where there is one, until it is asked to stop
HELD = """
import os, signal, sys, time  # noqa
from pathlib import Path  # noqa
from recipes.common.run_dir.heartbeat import Heartbeat  # noqa
_enter, _hold = Heartbeat.enter, Path(sys.argv[sys.argv.index("--out-dir") + 1]).with_suffix(".hold")
def _held(self, step, phase):
    _enter(self, step, phase)
    while phase == "data" and _hold.exists() and step > int(_hold.read_text()):
        if signal.getsignal(signal.SIGTERM).__self__.name is not None:
            break
        time.sleep(0.1)
        _enter(self, step, phase)  # it does not hang
Heartbeat.enter = _held
"""


def hold(run_dir: Path, step: int = STEPS) -> None:
    """Let the ranks of a HELD recipe train to the end of `step` and wait there."""
    written = run_dir.with_suffix(".hold.new")
    written.write_text(str(step))
    written.rename(run_dir.with_suffix(".hold"))


def recipe_copy(folder: Path, *, steps: int = STEPS, every: int = EVERY, extra: str = "") -> Path:
    """Write a small recipe of `steps` steps that saves every `every` steps."""
    return copy_repository(folder, extra=SETTINGS.format(steps=steps, every=every, extra=extra))


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    return {**kept, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def supervise(
    recipe: Path, run_dir: Path, *options: object, launcher: str = f"{LAUNCHER} 2", flags: tuple = ()
) -> subprocess.Popen | ForkedProcess:
    """Start the supervisor; its output and its ranks' goes to RUN_DIR.out.

    With the launcher of `forked_jobs`, supervisor and ranks are forks of this process; with any other, a program of its own.
    """
    words = ["--backoff-seconds", "0.1", "--no-preflight", *options, "--launcher", launcher, recipe, "--out-dir", run_dir, *flags]
    words = [str(word) for word in words]
    with run_dir.with_suffix(".out").open("ab") as output:
        if launcher.split()[0] == LAUNCHER:
            return start_job(words, output.fileno(), Prepare(supervisor=_shorten_grace))
        command = [sys.executable, str(ROOT / "tools" / "supervise" / "__main__.py"), *words]
        return subprocess.Popen(command, env=environment(), stdout=output, stderr=output)


def _shorten_grace() -> None:
    """Let the supervisor wait less for the tracebacks of ranks that hold at a step, and print none."""
    attempt.GRACE_SECONDS = 1.0


def output(run_dir: Path) -> str:
    return run_dir.with_suffix(".out").read_text()


def wait_until(condition: Callable[[], object], seconds: float = 300.0, what: object = "") -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:.0f} s: {what() if callable(what) else what}"
        time.sleep(0.02)


def wait_for_step(job: subprocess.Popen | ForkedProcess | None, run_dir: Path, step: int, since: float = 0.0) -> list[Beat]:
    """Until every rank of the newest attempt is at `step` or later, and alive. Gives their heartbeats."""

    def there() -> bool:
        assert job is None or job.poll() is None, output(run_dir)
        beats = [beat for beat in read_beats(run_dir) if beat.time >= since]
        return bool(beats) and all(beat.step >= step and psutil.pid_exists(beat.pid) for beat in beats)

    wait_until(there, what=lambda: output(run_dir)[-3000:])
    return [beat for beat in read_beats(run_dir) if beat.time >= since]


def wait_at(job: subprocess.Popen | ForkedProcess | None, run_dir: Path, step: int, since: float = 0.0) -> list[Beat]:
    """Until every rank of the newest attempt is held after `step`, and what it saved until then is sealed. Gives heartbeats."""
    beats = wait_for_step(job, run_dir, step + 1, since)
    wait_until(lambda: sealed_step(run_dir) == step // EVERY * EVERY, what=lambda: output(run_dir)[-3000:])
    return beats


def processes_under(supervisor: ForkedProcess) -> list[psutil.Process]:
    """A forked supervisor's launcher, ranks, and their guards."""
    return psutil.Process(supervisor.pid).children(recursive=True)


def processes_of(run_dir: Path) -> list[psutil.Process]:
    """Ranks, their guards and launchers: whoever names the run directory, and the guards beside such a one; no supervisor."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if str(run_dir) in words and str(ROOT / "tools" / "supervise" / "__main__.py") not in words:
                found.append(process)
                found += [child for child in process.children() if any(w.endswith("rank_guard.py") for w in child.cmdline())]
        except psutil.Error:
            continue
    return found


def assert_all_end(processes: list[psutil.Process], seconds: float = END_SECONDS) -> None:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    alive = [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not alive, f"still there after {seconds:.0f} s: {alive}"


def ends(run_dir: Path) -> list[dict]:
    return [record for record in read_attempts(run_dir) if record["event"] == "end"]


def losses(run_dir: Path) -> dict[int, tuple[float, float]]:
    return {record["step"]: (record["loss"], record["grad_norm"]) for record in read_metrics(run_dir)}
