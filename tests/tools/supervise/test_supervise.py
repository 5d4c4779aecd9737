"""A run that is broken in every way ends like one that nobody touched: the same losses, the same weights, to the last bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from recipes.common.recipe import ROOT
from recipes.common.run_dir.attempts import sealed_step
from recipes.common.run_dir.heartbeat import read_beats
from recipes.common.run_dir.lease import FOLDER, held
from recipes.common.runtime.supervisor_link import WAITING_FUNCTION
from tests.support.forked_jobs import LAUNCHER
from tests.support.small_runs import assert_same_state
from tests.support.supervised import (
    assert_all_end,
    ends,
    hold,
    losses,
    output,
    processes_under,
    recipe_copy,
    supervise,
    wait_at,
    wait_until,
)

RECIPE = "recipes/quickstart.py"


def assert_same_run(straight: Path, run_dir: Path) -> None:
    assert losses(run_dir) == losses(straight)
    assert_same_state(straight, run_dir, 0.0)


def test_a_killed_rank_a_killed_launcher_and_a_stopped_rank(straight, tmp_path):
    recipe, uninterrupted = straight
    run_dir = tmp_path / "run"
    hold(run_dir, 6)
    supervisor = supervise(recipe, run_dir, "--hang-seconds", 3)

    beats = wait_at(supervisor, run_dir, 6)
    everyone = processes_under(supervisor)
    assert len(everyone) == 2 * 2 + 1  # ranks, guards, the launcher
    os.kill(beats[1].pid, signal.SIGKILL)
    hold(run_dir, 10)
    assert_all_end(everyone)

    wait_at(supervisor, run_dir, 10, since=time.time())
    everyone = processes_under(supervisor)
    (launcher,) = psutil.Process(supervisor.pid).children()
    launcher.kill()
    hold(run_dir, 13)
    assert_all_end(everyone)

    beats = wait_at(supervisor, run_dir, 13, since=time.time())
    everyone = processes_under(supervisor)
    os.kill(beats[1].pid, signal.SIGSTOP)
    hold(run_dir)
    assert supervisor.wait(120) == 0, output(run_dir)
    assert_all_end(everyone)

    killed, orphaned, hung, finished = ends(run_dir)
    assert (killed["cause"], killed["sealed_step"]) == ("rank_lost", 4)
    assert killed["detail"].startswith("rank 1 on ")
    assert killed["lost_steps"] == killed["last_step"] - 4 >= 1
    assert (orphaned["cause"], orphaned["sealed_step"]) == ("rank_lost", 8)
    assert hung["cause"] == "hang"
    assert "did not reach the collective: rank 1 on " in hung["detail"]
    assert "its process is stopped (state T)" in hung["detail"]
    assert "rank 0" not in hung["detail"]
    stacks = (run_dir / "logs/stacks/attempt_3/rank_00000.txt").read_text()
    assert any(word in stacks for word in (WAITING_FUNCTION, "torch/distributed", "pipeline/stage_messages"))
    assert finished["cause"] == "finished"
    assert_same_run(uninterrupted, run_dir)


def test_a_killed_supervisor_takes_all_down_and_one_asked_to_end_saves(straight, tmp_path):
    recipe, uninterrupted = straight
    run_dir = tmp_path / "run"
    hold(run_dir, 6)
    supervisor = supervise(recipe, run_dir)
    wait_at(supervisor, run_dir, 6)
    everyone = processes_under(supervisor)
    supervisor.kill()
    assert_all_end(everyone)
    supervisor.wait()

    since = time.time()
    supervisor = supervise(recipe, run_dir, flags=("--resume",))
    wait_at(supervisor, run_dir, 6, since)
    everyone = processes_under(supervisor)
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(30) == 75, output(run_dir)
    assert_all_end(everyone, 1)
    assert sealed_step(run_dir) == max(losses(run_dir)) == 7
    assert "stopped by SIGTERM" in output(run_dir)

    hold(run_dir)
    assert supervise(recipe, run_dir, flags=("--resume",)).wait(120) == 0, output(run_dir)
    assert [end["cause"] for end in ends(run_dir)] == ["supervisor_lost", "stopped", "finished"]
    assert_same_run(uninterrupted, run_dir)


def test_ranks_may_change_between_restarts(straight, tmp_path):
    """2 ranks, 4, 1: each time the recipe's layout for that many, on the same batches. Rounding is all that differs."""
    recipe, one_layout = straight
    run_dir, hostfile = tmp_path / "run", tmp_path / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    launcher = LAUNCHER + " {hostfile}"
    hold(run_dir, 5)
    supervisor = supervise(recipe, run_dir, "--hostfile", hostfile, launcher=launcher, flags=("--max-steps", 11))
    since = 0.0
    for step, slots in ((5, 4), (9, 1)):
        beats = wait_at(supervisor, run_dir, step, since)
        hostfile.write_text(f"localhost slots={slots}\n")
        since = time.time()
        os.kill(beats[0].pid, signal.SIGKILL)
        hold(run_dir, step + 4)
    assert supervisor.wait(120) == 0, output(run_dir)
    starts = json.loads((run_dir / "run.json").read_text())["starts"]
    layouts = [(s["world_size"], s["layout"]["tensor"], s["layout"]["pipeline"], s["sizes"]["data"]) for s in starts]
    assert layouts == [(2, 1, 2, 1), (4, 2, 2, 1), (1, 1, 1, 1)]
    assert [s["sizes"]["tokens_per_step"] for s in starts] == [starts[0]["sizes"]["tokens_per_step"]] * 3
    expected, found = losses(one_layout), losses(run_dir)
    assert set(found) == set(range(1, 12))
    assert max(abs(found[step][0] - expected[step][0]) / expected[step][0] for step in found) < 1e-6


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")
def test_a_full_disk_costs_a_save_and_nothing_else(straight, tmp_path):
    recipe, uninterrupted = straight
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120m", "tmpfs", disk], check=True)
    try:
        (disk / "ballast").write_bytes(bytes(110 << 20))  # a checkpoint takes 20 MB
        run_dir = disk / "run"
        hold(run_dir, 6)
        supervisor = supervise(recipe, run_dir)
        wait_until(lambda: f"saving {run_dir}/checkpoints/step_00000004 failed" in output(run_dir), what=lambda: output(run_dir))
        os.kill(read_beats(run_dir)[1].pid, signal.SIGKILL)  # and a rank is lost before there is any checkpoint
        (disk / "ballast").unlink()
        hold(run_dir)
        assert supervisor.wait(120) == 0, output(run_dir)
        assert [end["cause"] for end in ends(run_dir)] == ["rank_lost", "finished"]
        assert_same_run(uninterrupted, run_dir)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


REFUSED_ONCE = """
import fcntl, os, pathlib, sys, termios, time
sys.path.insert(0, {root!r})
from recipes.common.runtime.exits import refusals
from recipes.common.runtime.supervisor_link import SupervisorLink
link, starts = SupervisorLink(0), pathlib.Path({starts!r})
os.write(link._stacks, b"here")
while any(fcntl.ioctl(link._stacks, termios.FIONREAD, bytes(4))):  # what the guard reads when it has reached the supervisor
    time.sleep(0.01)
starts.write_text(starts.read_text() + "." if starts.exists() else ".")
with refusals(0, link.report_exit):
    if len(starts.read_text()) == {refused}:
        raise OSError(28, "No space left on device", "run/logs")
if len(starts.read_text()) == 1:
    link.report_exit("failed", "LookupError: the first start fails by itself")
    sys.exit(1)
link.report_exit("finished")
"""


@pytest.mark.parametrize(
    ("refused", "code", "causes"), [(2, 0, ["rank_failed", "disk_error", "finished"]), (1, 2, ["disk_error"])]
)
def test_a_disk_that_refuses_a_restart_may_do_better_later_and_one_that_refuses_the_first_is_the_users(
    tmp_path, refused, code, causes
):
    (tmp_path / "recipe.py").write_text(REFUSED_ONCE.format(root=str(ROOT), starts=str(tmp_path / "starts"), refused=refused))
    supervisor = supervise(tmp_path / "recipe.py", tmp_path / "run", launcher=sys.executable)
    assert supervisor.wait(60) == code, output(tmp_path / "run")
    assert [end["cause"] for end in ends(tmp_path / "run")] == causes
    assert "run/logs: No space left on device; free some space there, and start again" in output(tmp_path / "run")


NAN = """
from recipes.common.engine.trainer import Trainer  # noqa
_step = Trainer.train_step
Trainer.train_step = lambda *a: replace(_step(*a), loss=float("nan"))
"""


FULL = """
recipe = replace(recipe, checkpoints=Checkpoints(every_steps=10, last_save_minutes=0), steps=2)
recipe = replace(recipe, schedule=replace(recipe.schedule, warmup_steps=1))
import recipes.common.checkpoint.save_in_flight as _saves  # noqa
def _full(*a): raise OSError(28, "No space left on device")  # noqa
_saves.write_rank_file = _full
"""


@pytest.mark.parametrize(
    ("extra", "code", "causes", "message"),
    [
        ("recipe = replace(recipe, steps=0)", 2, ["user_error"], "steps=0 must be a whole number from 1"),
        (NAN, 3, ["training_error"], "ended: training_error: TrainingError: step 1: loss is nan"),
        (FULL, 4, ["unsaved"], "ended: unsaved: the last state, of step 2, is not on disk: 1 saves failed"),
    ],
    ids=["a wrong recipe", "useless numbers", "a full disk at the end"],
)
def test_what_a_restart_cannot_cure_is_not_restarted(tmp_path, extra, code, causes, message):
    recipe, run_dir = recipe_copy(tmp_path, extra=extra), tmp_path / "run"
    supervisor = supervise(recipe, run_dir, launcher=f"{LAUNCHER} 1")
    assert supervisor.wait(120) == code, output(run_dir)
    assert message in output(run_dir)
    assert [end["cause"] for end in ends(run_dir)] == causes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.py"], "there is no recipe file none.py"),
        (["--hostfile", "none", RECIPE], "--hostfile none: No such file or directory"),
        (["--spares", "-1", RECIPE], "--spares=-1 must be 0 or more"),
        ([RECIPE, "--out-dir", ""], "--out-dir='' names no folder; give --out-dir DIR"),
        (
            ["--hostfile", "{folder}/hosts", "--spares", "2", "--probe", "false", RECIPE, "--out-dir", "{folder}/run"],
            "--hostfile {folder}/hosts: 2 hosts with 2 ranks, 2 spare; the recipe has layouts for",
        ),
    ],
)
def test_wrong_words_are_refused(words, message, tmp_path):
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    words, message = [word.format(folder=tmp_path) for word in words], message.format(folder=tmp_path)
    command = [sys.executable, "tools/supervise/__main__.py", "--no-preflight", "--launcher", "false", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_program_that_never_works_is_given_up(tmp_path):
    (tmp_path / "recipe.py").write_text("raise LookupError('planted')\n")
    supervisor = supervise(tmp_path / "recipe.py", tmp_path / "run", "--restarts", 2, launcher=sys.executable)
    assert supervisor.wait(60) == 1
    assert [end["cause"] for end in ends(tmp_path / "run")] == ["launcher_failed"] * 3
    assert "giving up after 2 restarts without a new checkpoint; the last checkpoint is of step 0" in output(tmp_path / "run")


def test_a_second_supervisor_of_a_folder_is_refused_before_it_starts_anything(tmp_path):
    (tmp_path / "recipe.py").write_text("print('started')\n")
    run_dir = tmp_path / "run"
    with held(run_dir, run_dir / FOLDER, "supervisor", "a supervisor"):
        second = supervise(tmp_path / "recipe.py", run_dir, launcher=sys.executable)
        assert second.wait(60) == 2
    told = output(run_dir)
    assert f"error: {run_dir} is in use by a supervisor (process {os.getpid()} on " in told and "started" not in told
    assert not run_dir.exists()


def test_a_dry_run_starts_no_job(tmp_path):
    (tmp_path / "recipe.py").write_text("import sys\nprint(sys.argv[1:])\nsys.exit(7)\n")
    words = [tmp_path / "recipe.py", "--dry-run", "--out-dir", tmp_path / "run"]
    command = [sys.executable, ROOT / "tools/supervise/__main__.py", "--processes", 8, "--launcher", "false", *words]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 7
    assert done.stdout == f"{[*map(str, words[1:]), '--world-size', '8']}\n"
    assert not (tmp_path / "run").exists()
