"""SIGTERM and SIGUSR1 in the middle of a run: every rank saves one step and exits cleanly; resumed, it is equal to the bit."""

import os
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from recipes.common import train
from recipes.common.recipe import Checkpoints, Evaluation
from recipes.common.run_dir.checkpoint_folders import sealed_checkpoints
from recipes.common.run_dir.metrics import read_metrics
from tests.support.small_runs import assert_same_state, run
from tests.support.tiny import tiny_recipe, write_shards

WORLD, STEPS, HELD = 2, 6, 3  # HELD: the step in which the signal comes


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """(recipe, run directory of a run that nobody interrupted)"""
    folder = tmp_path_factory.mktemp("signals")
    write_shards(folder / "data")
    recipe = tiny_recipe(folder / "data", steps=STEPS, evaluation=Evaluation(), checkpoints=Checkpoints())
    run(recipe, WORLD, folder / "straight")
    return recipe, folder / "straight"


def records(out_dir: Path) -> dict[int, tuple[float, float]]:
    return {record["step"]: (record["loss"], record["grad_norm"]) for record in read_metrics(out_dir)}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_stops_the_run_after_saving_and_the_resumed_run_is_bitwise_equal(straight, tmp_path, number):
    recipe, uninterrupted = straight
    job = get_context("fork").Process(target=_job, args=(recipe, tmp_path, number))
    job.start()
    while job.is_alive() and not (tmp_path / "held").exists():
        job.join(0.01)
    os.killpg(job.pid, number)
    (tmp_path / "sent").touch()
    job.join()
    assert job.exitcode == 0  # every rank came to the end of its run
    (left,) = sealed_checkpoints(tmp_path)
    step = int(left.name.removeprefix("step_"))
    before = records(tmp_path)
    assert HELD <= step == max(before) < STEPS
    resumed = run(recipe, WORLD, tmp_path, resume=True)
    assert records(tmp_path) == records(uninterrupted)
    assert min(s for s in resumed if s not in before) == step + 1
    assert_same_state(uninterrupted, tmp_path, 0.0)


def _job(recipe, out_dir: Path, number: int) -> None:
    """A launcher that lets its ranks finish: it is deaf to the signal that the whole group gets. Rank 1 awaits it in a step."""
    os.setsid()
    signal.signal(number, signal.SIG_IGN)
    seed = train.seed_dropout

    def hold(run_seed, step, grid):
        if step == HELD and grid.rank == 1:
            (out_dir / "held").touch()
            while not (out_dir / "sent").exists():
                time.sleep(0.01)
        seed(run_seed, step, grid)

    train.seed_dropout = hold
    run(recipe, WORLD, out_dir)
