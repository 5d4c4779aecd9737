"""The sinks that show a run's numbers never end it."""

from __future__ import annotations

import builtins
import cProfile
import os
import pstats
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.common.recipe import ROOT
from recipes.common.run_dir import run_log
from recipes.common.run_dir.metrics import read_metrics
from recipes.common.run_dir.run_log import RunLog
from tools.common.forked_ranks import run_ranks

START_WANDB, START_TENSORBOARD = run_log.start_wandb, run_log.start_tensorboard


@pytest.fixture(autouse=True)
def metrics_and_progress_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for start in ("start_wandb", "start_tensorboard"):
        monkeypatch.setattr(run_log, start, lambda *_: None)


def open_log(folder: Path, run_steps: int = 10) -> RunLog:
    return RunLog(folder, name="tiny", run_steps=run_steps)


def steps_in(path: Path) -> list[int]:
    return [record["step"] for record in read_metrics(path)]


def test_tensorboard_gets_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setattr(run_log, "start_tensorboard", START_TENSORBOARD)
    log = open_log(tmp_path)
    for step in (1, 2):
        log.write({"step": step, "loss": 2.0 / step, "words": "not drawn", "loss_scale": None})
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.0), (2, 1.0)]


WANDB_RUN = """
import io, socket, sys
from pathlib import Path
opened = []
real = socket.socket.connect
def connect(self, address):
    if self.family != socket.AF_UNIX and not str(address[0]).startswith(("127.", "::1", "localhost")):
        opened.append(address)
    return real(self, address)
socket.socket.connect = connect
from recipes.common.run_dir.run_log import RunLog
stream = sys.stderr = io.StringIO()
log = RunLog(Path(sys.argv[1]), name="tiny", run_steps=2, config={"lr": 1.0}, run_id="abc123")
for step in (1, 2):
    log.write({"step": step, "loss": float("nan")})
log.close()
assert not opened, opened
shown = stream.getvalue()  # wandb is silent: the progress bar owns the terminal
assert "W&B" not in shown and "wandb" not in shown, shown
"""


def wandb_environment(folder: Path) -> dict[str, str]:
    """Nobody is logged in: no key, no netrc, no settings."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    return kept | {"HOME": str(folder), "NETRC": str(folder / "netrc")}


def test_wandb_is_offline_unless_logged_in(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    command = [sys.executable, "-c", WANDB_RUN, str(tmp_path / "run")]
    done = subprocess.run(
        command, cwd=ROOT, env=wandb_environment(tmp_path), capture_output=True, text=True, timeout=120, stdin=None
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "run/wandb").glob("offline-run-*-abc123")
    assert list(folder.glob("*.wandb"))
    assert "wandb" not in done.stdout + done.stderr
    assert steps_in(tmp_path / "run") == [1, 2]


def test_wandb_can_be_switched_off_by_its_own_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setattr(run_log, "start_wandb", START_WANDB)
    run_ranks(_log_without_wandb, 1, tmp_path)
    assert steps_in(tmp_path / "run") == [1, 2]
    assert not list((tmp_path / "run").glob("wandb/*run*"))


def _log_without_wandb(folder: Path) -> None:
    environment = wandb_environment(folder) | {"WANDB_MODE": "disabled"}
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["log", str(folder / "run")]
    exec(WANDB_RUN, {})


@pytest.mark.parametrize(("package", "said"), [("wandb", "W&B"), ("torch.utils.tensorboard", "TensorBoard")])
def test_a_missing_package_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, package: str, said: str
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments, **keywords):
        if name == package:
            raise ImportError(f"No module named {name!r}")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    if package == "wandb":
        monkeypatch.setattr(run_log, "start_wandb", START_WANDB)
    else:
        monkeypatch.setattr(run_log, "start_tensorboard", START_TENSORBOARD)
    log = open_log(tmp_path)
    assert capsys.readouterr().err == f"{said} is off: ImportError: No module named '{package}'\n"
    log.write({"step": 1, "loss": 1.0})
    log.close()
    assert steps_in(tmp_path) == [1]


def test_a_sink_that_fails_in_the_middle_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def log(self, record) -> None:
            raise RuntimeError("gone\naway")

    monkeypatch.setattr(run_log, "start_wandb", lambda *_: Broken())
    log = open_log(tmp_path)
    for step in (1, 2):
        log.write({"step": step, "loss": 1.0})
    log.close()
    assert capsys.readouterr().err.count("W&B is off from step 1: RuntimeError: gone away") == 1
    assert steps_in(tmp_path) == [1, 2]


def test_writing_a_step_is_cheap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes a few dozen calls, however many steps came before, and does not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("a step waits for the disk"))
    log = open_log(tmp_path, run_steps=10**6)
    calls = []
    for first in (1, 1001):
        with cProfile.Profile() as counted:
            for step in range(first, first + 1000):
                log.write({"step": step, "loss": 1.0, "lr": 1.0, "grad_norm": 1.0, "tokens_per_second": 1.0})
        calls.append(pstats.Stats(counted).total_calls / 1000)
    log.close()
    assert max(calls) < 100, calls  # 53 of them as this was written
