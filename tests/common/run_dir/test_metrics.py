"""metrics.jsonl survives kills and resumes, and the sinks that show the numbers never end a run."""

from __future__ import annotations

import builtins
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipes.common.recipe import ROOT
from recipes.common.run_dir import metrics
from recipes.common.run_dir.metrics import RunLog, describe, encode, read_metrics, rewind_metrics


def open_log(folder: Path, stream=None, **options) -> RunLog:
    options = {"name": "tiny", "run_steps": 10, "wandb": False, "tensorboard": False} | options
    return RunLog(folder, stream=stream or io.StringIO(), **options)


def steps_in(path: Path) -> list[int]:
    return [record["step"] for record in read_metrics(path)]


def test_lines_read_back_equal(tmp_path: Path) -> None:
    records = [
        {"step": 1, "loss": 1 / 3, "lr": 5e-324, "grad_norm": 1.7976931348623157e308, "tokens": 2**60, "note": "Ω\n"},
        {"step": 2, "loss": math.nan, "lr": math.inf, "grad_norm": -math.inf, "loss_scale": None},
    ]
    log = open_log(tmp_path)
    for record in records:
        log.write(record)
    found = list(read_metrics(tmp_path))
    assert found[0] == records[0]
    assert math.isnan(found[1].pop("loss"))
    assert found[1] == {key: value for key, value in records[1].items() if key != "loss"}
    log.close()


def test_every_line_is_plain_json() -> None:
    def refuse(name: str) -> None:
        raise ValueError(name)

    line = encode({"step": 1, "loss": math.nan, "norm": math.inf})
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "loss": "NaN", "norm": "Infinity"}
    assert line.count(b"\n") == 1


def test_kill_9_loses_one_line_at_most(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from recipes.common.run_dir.metrics import RunLog\n"
        f"log = RunLog(Path({str(tmp_path)!r}), name='x', run_steps=10**9, wandb=False, tensorboard=False)\n"
        "for step in range(1, 10**9):\n"
        "    log.write({'step': step, 'loss': 1 / step})\n"
        "    print(step, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    for _ in range(500):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    told = 500 + len(process.stdout.read().splitlines())
    process.wait()
    found = steps_in(tmp_path)
    assert found == list(range(1, len(found) + 1))
    assert told - 1 <= len(found) <= told + 1  # the last line of stdout may be cut, the last step not yet told


def test_a_resume_moves_later_steps_aside(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for step in range(8):
        log.write({"step": step, "loss": 8.0 - step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 8, "lo')  # cut by a kill
    stream = io.StringIO()
    log = open_log(tmp_path, stream, resumed_step=5)
    log.write({"step": 6, "loss": 0.5})
    log.close()
    assert steps_in(tmp_path) == [0, 1, 2, 3, 4, 5, 6]
    aside = tmp_path / "metrics.after_step_00000005.jsonl"
    assert aside.read_bytes().splitlines() == [
        b'{"step": 6, "loss": 2.0}',
        b'{"step": 7, "loss": 1.0}',
        b'{"step": 8, "lo',
    ]
    assert aside.name in stream.getvalue()
    # once more from the same step: the first attempt's lines stay
    open_log(tmp_path, resumed_step=5).close()
    assert len(aside.read_bytes().splitlines()) == 4
    assert steps_in(tmp_path) == [0, 1, 2, 3, 4, 5]


def test_a_resume_with_nothing_to_move_changes_nothing(tmp_path: Path) -> None:
    assert rewind_metrics(tmp_path, 5) is None
    log = open_log(tmp_path)
    log.write({"step": 1, "loss": 1.0})
    log.close()
    before = (tmp_path / "metrics.jsonl").stat()
    assert rewind_metrics(tmp_path, 1) is None
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before.st_ino
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_fresh_start_in_a_used_directory_keeps_the_old_lines_aside(tmp_path: Path) -> None:
    for loss in (1.0, 2.0):
        log = open_log(tmp_path)
        log.write({"step": 0, "val_loss": loss})
        log.close()
    assert [record["val_loss"] for record in read_metrics(tmp_path)] == [2.0]
    assert [record["val_loss"] for record in read_metrics(tmp_path / "metrics.after_step_00000000.jsonl")] == [1.0]


def test_a_bad_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not a record of a step"):
        steps_in(path)


def test_plain_lines_are_few_where_stderr_is_no_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    log = open_log(tmp_path, stream)
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    for step in range(1, 11):
        now[0] += 3.0
        log.write({"step": step, "loss": 2.0, "lr": 1e-3, "grad_norm": 1.5, "tokens_per_second": 12_345.0})
    log.close()
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "5/10", "9/10", "10/10"]
    assert lines[0] == "step 1/10 | loss 2.0000 | 12.3k tok/s | lr 1.00e-03 | grad norm 1.5"


def test_the_last_step_is_told_wherever_the_run_stops(tmp_path: Path) -> None:
    stream = io.StringIO()
    log = open_log(tmp_path, stream)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 2.0})
    log.close()
    assert stream.getvalue() == "step 1/10 | loss 2.0000\nstep 3/10 | loss 2.0000\n"


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    log = open_log(tmp_path, stream, resumed_step=4)
    log.write({"step": 5, "loss": 2.5, "tokens_per_second": 9.0})
    log.note("checkpoint saved")
    log.close()
    text = stream.getvalue()
    assert "5/10" in text
    assert "loss 2.5000 | 9 tok/s" in text
    assert "checkpoint saved" in text


def test_what_people_see() -> None:
    record = {"step": 1, "loss": math.nan, "loss_scale": 65536.0, "skipped_steps": 2, "tokens_per_second": 2.5e6}
    assert describe(record) == "loss nan | 2.5M tok/s | scale 65536 | skipped 2"
    assert describe({"step": 0, "val_loss": 9.0, "skipped_steps": 0}) == "val loss 9.0000"


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = open_log(tmp_path, tensorboard=True)
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
from recipes.common.run_dir.metrics import RunLog
stream = io.StringIO()
log = RunLog(Path(sys.argv[1]), name="tiny", run_steps=2, config={"lr": 1.0}, run_id="abc123", tensorboard=False,
             stream=stream)
for step in (1, 2):
    log.write({"step": step, "loss": float("nan")})
log.close()
assert not opened, opened
assert "W&B" not in stream.getvalue(), stream.getvalue()
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
    assert "wandb" not in done.stdout + done.stderr  # silent: the progress bar owns the terminal
    assert steps_in(tmp_path / "run") == [1, 2]


def test_wandb_can_be_switched_off_by_its_own_variable(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    command = [sys.executable, "-c", WANDB_RUN, str(tmp_path / "run")]
    environment = wandb_environment(tmp_path) | {"WANDB_MODE": "disabled"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "run").glob("wandb/*run*"))


@pytest.mark.parametrize(("package", "said"), [("wandb", "W&B"), ("torch.utils.tensorboard", "TensorBoard")])
def test_a_missing_package_costs_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, said: str) -> None:
    real = builtins.__import__

    def without(name: str, *arguments, **keywords):
        if name == package:
            raise ImportError(f"No module named {name!r}")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    stream = io.StringIO()
    log = open_log(tmp_path, stream, wandb=package == "wandb", tensorboard=package != "wandb")
    assert stream.getvalue() == f"{said} is off: ImportError: No module named '{package}'\n"
    log.write({"step": 1, "loss": 1.0})
    log.close()
    assert steps_in(tmp_path) == [1]


def test_a_sink_that_fails_in_the_middle_is_left_out(tmp_path: Path) -> None:
    class Broken:
        def log(self, record) -> None:
            raise RuntimeError("gone\naway")

    stream = io.StringIO()
    log = open_log(tmp_path, stream)
    log._wandb = Broken()
    for step in (1, 2):
        log.write({"step": step, "loss": 1.0})
    log.close()
    assert stream.getvalue().count("W&B is off from step 1: RuntimeError: gone away") == 1
    assert steps_in(tmp_path) == [1, 2]


def test_writing_a_step_is_cheap(tmp_path: Path) -> None:
    log = open_log(tmp_path, run_steps=10**6)
    begin = time.perf_counter()
    for step in range(1, 1001):
        log.write({"step": step, "loss": 1.0, "lr": 1.0, "grad_norm": 1.0, "tokens_per_second": 1.0})
    log.close()
    assert time.perf_counter() - begin < 2.0  # under 2 ms a step, even here


FULL_FOR_A_WHILE = """
import resource, sys
from pathlib import Path
from recipes.common.run_dir.metrics import RunLog, read_metrics
out_dir = Path(sys.argv[1])
log = RunLog(out_dir, name="tiny", run_steps=9, wandb=False, tensorboard=False)
log.write({"step": 1, "loss": 1.0})
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
size = (out_dir / "metrics.jsonl").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 7, hard))  # the kernel takes 7 more bytes, then refuses
for step in (2, 3):
    log.write({"step": step, "loss": 1.0})
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
log.write({"step": 4, "loss": 1.0})
log.close()
print([record["step"] for record in read_metrics(out_dir / "metrics.jsonl")])
"""


def test_lines_wait_in_memory_while_the_disk_takes_none(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL_FOR_A_WHILE, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[1, 2, 3, 4]", done.stderr
    assert done.stderr.count("its lines wait in memory") == 1
