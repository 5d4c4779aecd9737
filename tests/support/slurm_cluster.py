"""Runs a Slurm cluster of two nodes on this machine: munged, slurmctld, two slurmds, their own configuration. Needs root."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from recipes.common.runtime.network import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
NODES = ("node1", "node2")


def missing() -> str:
    """Return why a cluster cannot run here; empty if it can."""
    lacking = [name for name in PROGRAMS if _which(name) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)}"
    return "" if os.geteuid() == 0 else "needs root, for slurmd"


@dataclass(frozen=True)
class Cluster:
    folder: Path

    def call(self, *words: object, **options: object) -> str:
        """Return a Slurm command's output; assert that it succeeds."""
        variables = {**os.environ, **options.pop("env", {}), "SLURM_CONF": str(self.folder / "slurm.conf")}
        done = subprocess.run([str(w) for w in words], env=variables, capture_output=True, text=True, timeout=300, **options)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Return a job's state, such as RUNNING or COMPLETED."""
        return self.call("scontrol", "show", "job", job, "--oneliner").partition(" JobState=")[2].split()[0]


@contextlib.contextmanager
def slurm_cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="trifold-slurm-") as name, contextlib.ExitStack() as undo:
        folder = Path(name)
        folder.chmod(0o755)
        cluster = Cluster(folder)
        variables = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        _write_configuration(folder)
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "key").chmod(0o600)
        munge = {"--key-file": "key", "--socket": "munge.socket", "--pid-file": "munge.pid", "--log-file": "munge.log",
                 "--seed-file": "munge.seed"}  # fmt: skip
        daemons = [["munged", "--foreground", "--force", *(f"{flag}={folder / file}" for flag, file in munge.items())]]
        daemons += [["slurmctld", "-D", "-c"], *(["slurmd", "-D", "-N", node] for node in NODES)]
        for index, words in enumerate(daemons):
            log = (folder / f"daemon_{index}.log").open("w")
            daemon = subprocess.Popen([_which(words[0]), *words[1:]], env=variables, stdout=log, stderr=log)
            undo.callback(daemon.wait)
            undo.callback(daemon.kill)
            if index == 0:
                _wait(lambda: (folder / "munge.socket").exists(), folder)
        undo.callback(subprocess.run, ["scancel", "--full", "--signal=KILL", "--user=root"], env=variables, capture_output=True)
        _wait(lambda: _ready(cluster), folder)
        yield cluster


def _write_configuration(folder: Path) -> None:
    host = socket.gethostname()
    (folder / "state").mkdir()
    lines = [
        "ClusterName=two",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={free_port()}",
        "SlurmUser=root",
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder / 'munge.socket'},cred_expire=5",  # a requeued job waits that long before it starts again
        f"StateSaveLocation={folder / 'state'}",
        f"SlurmdSpoolDir={folder}/spool_%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd_%n.pid",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SelectType=select/cons_tres",
        "SlurmdParameters=config_overrides",
        "ReturnToService=2",
        "MpiDefault=none",
        "SchedulerParameters=sched_interval=1,bf_interval=1",
        *(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=8 RealMemory=1000 State=UNKNOWN"
            for node in NODES
        ),
        f"PartitionName=all Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP OverTimeLimit=0",
    ]
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")


def _ready(cluster: Cluster) -> bool:
    with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
        return cluster.call("sinfo", "--noheader", "--states=idle", "--format=%D") == str(len(NODES))
    return False


def _wait(condition, folder: Path, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        logs = "\n".join(path.read_text()[-1500:] for path in sorted(folder.glob("daemon_*.log")))
        assert time.monotonic() < end, f"no cluster in {seconds:.0f} s:\n{logs}"
        time.sleep(0.1)


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
