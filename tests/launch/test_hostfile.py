"""launch/hostfile.sh over two hosts with sshds and names of their own: trained as on one host, bitwise, also over a cut cable."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from recipes.common.recipe import ROOT
from tests.support.small_runs import assert_same_state
from tests.support.supervised import (
    assert_all_end,
    ends,
    environment,
    hold,
    losses,
    output,
    processes_of,
    wait_at,
)
from tests.support.two_hosts import NAMES, missing, two_hosts

WHY_NOT = missing()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


@pytest.fixture(scope="module")
def hosts():
    with two_hosts() as there:
        yield there


def listening(pid: int) -> set[str]:
    """The addresses on which a process listens, as the kernel writes them."""
    files = {os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir() if file.is_symlink()}
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in files}


def test_two_hosts_train_as_one_and_go_on_after_a_cut_cable(hosts, straight, warm, tmp_path):
    recipe, one = straight
    run_dir = tmp_path / "two"
    hold(run_dir, 6)
    # three hosts are named and one is spare: the first, which nobody knows, is left out
    options = ["--hostfile", hosts.hostfile(1, "nowhere", *NAMES), "--spares", 1, "--backoff-seconds", 1, "--no-preflight"]
    command = hosts.command(0, "bash", ROOT / "launch/hostfile.sh", *options, recipe, "--out-dir", run_dir)
    variables = environment() | hosts.environment() | {"VIRTUAL_ENV": sys.prefix}
    variables["PATH"] = os.pathsep.join([str(hosts.folder / "bin"), environment()["PATH"]])
    launcher = hosts.folder / "bin" / "deepspeed"  # which starts DeepSpeed's programs on the hosts, and they the ranks, as it is
    launcher.write_text(f'#!/bin/sh\nexec {warm} -u {Path(sys.executable).parent / "deepspeed"} "$@"\n')
    launcher.chmod(0o755)
    del variables["PYTHONPATH"]
    with run_dir.with_suffix(".out").open("w") as file:
        job = subprocess.Popen(command, cwd=recipe.parents[1], env=variables, stdout=file, stderr=file)

    beats = wait_at(job, run_dir, 6)
    assert [beat.host for beat in beats] == list(NAMES)
    (secret,) = (run_dir / "logs").glob("secret_*.txt")
    assert secret.stat().st_mode & 0o777 == 0o600
    shown = " ".join(word for process in psutil.process_iter(["cmdline"]) for word in process.info["cmdline"] or [])
    assert secret.read_text().strip() not in shown + output(run_dir)
    assert listening(job.pid) == {"01004D0A"}  # 10.77.0.1, no other interface
    ranks = [psutil.Process(beat.pid) for beat in beats]
    guards = [child for rank in ranks for child in rank.children()]
    assert [any(word.endswith("rank_guard.py") for word in guard.cmdline()) for guard in guards] == [True, True]
    everyone = [*processes_of(run_dir), *ranks, *guards]
    hosts.set_link(1, "down")
    hold(run_dir)
    assert_all_end(ranks)
    hosts.set_link(1, "up")
    assert job.wait(300) == 0, output(run_dir)
    assert_all_end(everyone, 1)
    assert "host nowhere does not answer: excluded" in output(run_dir)
    assert not secret.exists()
    cut, *_, finished = ends(run_dir)
    assert (cut["cause"], cut["sealed_step"]) == ("host_lost", 4), cut
    assert "host beta with ranks [1]" in cut["detail"]
    assert finished["cause"] == "finished"
    assert losses(run_dir) == losses(one)
    assert_same_state(one, run_dir, 0.0)
