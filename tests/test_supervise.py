"""A run that is broken in every way ends like one that nobody touched: the same losses, the same weights, to the last bit."""

import os
import signal
import time
from pathlib import Path

import psutil

from recipes.common.checkpoint_files import sealed_checkpoints
from tests.supervised import (
    STEPS,
    assert_all_end,
    ends,
    losses,
    output,
    processes_of,
    supervise,
    wait_for_step,
)
from tests.test_checkpoint import assert_same_state


def assert_same_run(straight: Path, run_dir: Path) -> None:
    assert losses(run_dir) == losses(straight)
    assert_same_state(straight, run_dir, 0.0)


def test_a_killed_rank_a_killed_launcher_and_a_stopped_rank(straight, tmp_path):
    recipe, uninterrupted = straight
    run_dir = tmp_path / "run"
    supervisor = supervise(recipe, run_dir, "--stall-floor-seconds", 2, "--stall-steps", 20)

    beats = wait_for_step(supervisor, run_dir, 12)
    everyone = processes_of(run_dir)
    assert len(everyone) == 2 * 2 + 1  # ranks, guards, the launcher
    os.kill(beats[1].pid, signal.SIGKILL)
    assert_all_end(everyone)

    beats = wait_for_step(supervisor, run_dir, 22, since=time.time())
    everyone = processes_of(run_dir)
    (launcher,) = psutil.Process(supervisor.pid).children()
    launcher.kill()
    assert_all_end(everyone)

    beats = wait_for_step(supervisor, run_dir, 32, since=time.time())
    everyone = processes_of(run_dir)
    os.kill(beats[1].pid, signal.SIGSTOP)
    assert supervisor.wait(120) == 0, output(run_dir)
    assert_all_end(everyone)

    killed, orphaned, hung, finished = ends(run_dir)
    assert (killed["cause"], killed["sealed_step"]) == ("rank_lost", 10)
    assert killed["detail"].startswith("rank 1 on ")
    assert killed["lost_steps"] == killed["last_step"] - 10 >= 1
    assert (orphaned["cause"], orphaned["sealed_step"]) == ("rank_lost", 20)
    assert hung["cause"] == "hang"
    assert "did not reach the collective: rank 1 on " in hung["detail"]
    assert "its process is stopped (state T)" in hung["detail"]
    assert "rank 0" not in hung["detail"]
    stacks = run_dir / "logs" / "stacks" / "attempt_3"
    assert (
        "_sum_over_ranks" in (stacks / "rank_00000.txt").read_text()
        or "torch/distributed" in (stacks / "rank_00000.txt").read_text()
    )
    assert finished["cause"] == "finished"
    assert_same_run(uninterrupted, run_dir)


def test_a_killed_supervisor_takes_all_down_and_one_asked_to_end_saves(straight, tmp_path):
    recipe, uninterrupted = straight
    run_dir = tmp_path / "run"
    supervisor = supervise(recipe, run_dir)
    wait_for_step(supervisor, run_dir, 12)
    everyone = processes_of(run_dir)
    supervisor.kill()
    assert_all_end(everyone)
    supervisor.wait()

    since = time.time()
    supervisor = supervise(recipe, run_dir, flags=("--resume",))
    wait_for_step(supervisor, run_dir, 15, since)
    everyone = processes_of(run_dir)
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(30) == 75, output(run_dir)
    assert_all_end(everyone, 1)
    step = int(sealed_checkpoints(run_dir)[-1].name.removeprefix("step_"))
    assert step == max(losses(run_dir)) and 15 <= step < STEPS
    assert "left on SIGTERM" in output(run_dir)

    assert supervise(recipe, run_dir, flags=("--resume",)).wait(120) == 0, output(run_dir)
    assert [end["cause"] for end in ends(run_dir)] == ["supervisor_lost", "left", "finished"]
    assert_same_run(uninterrupted, run_dir)
