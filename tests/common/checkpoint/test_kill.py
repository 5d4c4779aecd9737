"""kill -9 at random moments, over saves and training, then --resume: nothing sealed is lost, and the end is bitwise the same.

TRIFOLD_KILLS sets how many kills (default 4); the acceptance run uses 100.
"""

import os
import random
import signal
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest

from recipes.common.recipe import Checkpoints, Evaluation
from recipes.common.run_dir.checkpoint_folders import sealed_checkpoints
from recipes.common.run_dir.metrics import read_metrics
from tests.support.small_runs import assert_same_state, run
from tests.support.tiny import tiny_recipe, write_shards

KILLS = int(os.environ.get("TRIFOLD_KILLS", "4"))
WORLD = 2


@pytest.mark.timeout(60 + 30 * KILLS)
def test_killed_runs_end_like_one_that_was_not(tmp_path):
    write_shards(tmp_path / "data")
    steps = 4 * KILLS
    recipe = tiny_recipe(tmp_path / "data", steps=steps, evaluation=Evaluation())
    recipe = replace(recipe, checkpoints=Checkpoints(every_steps=2, keep_last=2))
    run(recipe, WORLD, tmp_path / "straight")
    rng = random.Random(0)
    out_dir, kills, starts = tmp_path / "killed", 0, 0
    while True:
        before = _newest_step(out_dir)
        finished = _start(recipe, out_dir, resume=before > 0, kill=kills < KILLS, rng=rng)
        starts += 1
        assert _newest_step(out_dir) >= before  # a sealed checkpoint is never lost
        _assert_at_most_the_unsealed_steps_are_lost(out_dir)
        if finished and _newest_step(out_dir) == steps:
            break
        kills += 1
        assert starts < 3 * KILLS + 3, "the run does not get anywhere"
    assert kills >= KILLS or finished
    assert_same_state(tmp_path / "straight", out_dir, 0.0)


def _start(recipe, out_dir: Path, *, resume: bool, kill: bool, rng: random.Random) -> bool:
    """One start of the job in a process group of its own; when `kill`, the whole group gets SIGKILL at a random step or save."""
    context = get_context("fork")
    job = context.Process(target=_job, args=(recipe, out_dir, resume))
    job.start()
    if not kill:
        job.join()
        assert job.exitcode == 0
        return True
    # wait for the run to get going (or end), then strike within the next few steps: over a step, a save, a seal
    first = _newest_logged(out_dir)
    while job.is_alive() and _newest_logged(out_dir) <= first + rng.randrange(4):
        job.join(0.01)
    job.join(rng.random() * 0.15)
    if not job.is_alive():
        return job.exitcode == 0
    os.killpg(job.pid, signal.SIGKILL)
    job.join()
    return False


def _job(recipe, out_dir: Path, resume: bool) -> None:
    os.setsid()
    run(recipe, WORLD, out_dir, resume=resume)


def _newest_step(out_dir: Path) -> int:
    return max((int(folder.name.removeprefix("step_")) for folder in sealed_checkpoints(out_dir)), default=0)


def _newest_logged(out_dir: Path) -> int:
    path = out_dir / "metrics.jsonl"
    return max((record["step"] for record in read_metrics(path)), default=0) if path.exists() else 0


def _assert_at_most_the_unsealed_steps_are_lost(out_dir: Path) -> None:
    """A save is due every 2 steps and one may be in flight: at most the steps of two intervals are not yet sealed."""
    assert _newest_logged(out_dir) - _newest_step(out_dir) <= 2 * 2
