"""launch/slurm.sbatch on a Slurm cluster of two nodes: queued again by an operator and by the time limit's warning, bitwise."""

import sys
import time

import pytest

from recipes.common.recipe import ROOT
from tests.support.slurm_cluster import missing, slurm_cluster
from tests.support.small_runs import assert_same_state
from tests.support.supervised import STEPS, ends, environment, hold, losses, output, wait_at, wait_for_step, wait_until

WHY_NOT = missing()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


@pytest.fixture(scope="module")
def cluster():
    with slurm_cluster() as there:
        yield there


def test_a_job_goes_on_when_it_is_queued_again(cluster, straight, warm, tmp_path):
    recipe, uninterrupted = straight
    run_dir = tmp_path / "run"
    variables = environment() | {"VIRTUAL_ENV": sys.prefix}
    variables["PATH"] = f"{warm.parent}:{variables['PATH']}"
    words = [ROOT / "launch/slurm.sbatch", "--processes", 1, "--no-preflight", recipe, "--out-dir", run_dir]
    hold(run_dir, 6)
    job = cluster.call("sbatch", "--parsable", "--nodes=2", f"--output={run_dir.with_suffix('.out')}", *words, env=variables)

    wait_at(None, run_dir, 6)
    began = time.time()
    cluster.call("scontrol", "requeue", job)
    hold(run_dir, 10)
    wait_for_step(None, run_dir, 11, since=began)
    cluster.call("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@180 sends before the time limit
    wait_until(lambda: "scontrol requeue" in output(run_dir), what=lambda: output(run_dir)[-3000:])
    saved = max(losses(run_dir))
    hold(run_dir)
    wait_until(lambda: cluster.state(job) == "COMPLETED", what=lambda: output(run_dir)[-3000:])
    assert "after saving step" in output(run_dir)
    requeued, warned, finished = ends(run_dir)
    assert requeued["sealed_step"] >= 4
    assert (warned["cause"], warned["lost_steps"]) == ("stopped", 0)
    assert 11 <= warned["sealed_step"] == saved < STEPS
    assert finished["cause"] == "finished"
    assert losses(run_dir) == losses(uninterrupted)
    assert_same_state(uninterrupted, run_dir, 0.0)
