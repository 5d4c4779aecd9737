"""A process is known by more than its number."""

import ast
import os
import signal
import subprocess
import sys

import psutil
import pytest

from recipes.common.runtime import processes
from recipes.common.runtime.processes import KnownProcess, is_unended_child, kill_session, open_process
from tests.test_layering import SOURCE, name_of, parse

SLEEPER = [sys.executable, "-c", "import time; print(flush=True); time.sleep(1000)"]


@pytest.mark.parametrize("has_pidfd", [True, False])
def test_a_signal_reaches_the_process_that_was_opened_and_no_other(monkeypatch, has_pidfd):
    if not has_pidfd:
        monkeypatch.delattr(os, "pidfd_open")
    child = subprocess.Popen(SLEEPER)
    process = open_process(child.pid)
    assert (process.fd is None) != has_pidfd
    assert process.send(signal.SIGKILL)
    assert child.wait() == -9
    assert not process.send(signal.SIGKILL)
    process.close()
    assert open_process(child.pid) is None
    own = processes.start_of(os.getpid())
    assert not KnownProcess(os.getpid(), None, str(int(own) - 1)).send(signal.SIGKILL)  # our number, another start
    assert not KnownProcess(os.getpid(), None, None).send(signal.SIGKILL)


@pytest.mark.parametrize("path", SOURCE, ids=name_of)
def test_no_process_is_signalled_by_a_number_alone(path):
    """Popen's own methods know whether a child was reaped; everything else goes through recipes/common/runtime/processes.py."""
    if name_of(path) != "recipes/common/runtime/processes.py":
        used = {ast.unparse(node) for node in ast.walk(parse(path)) if isinstance(node, ast.Attribute)}
        assert not used & {"os.kill", "os.killpg", "psutil.Process"}


def test_a_session_ends_whole_with_the_number_of_its_leader_kept():
    program = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:]).pid, flush=True); sys.exit(3)"
    leader = subprocess.Popen([sys.executable, "-c", program, *SLEEPER], stdout=subprocess.PIPE, start_new_session=True)
    orphan = psutil.Process(int(leader.stdout.readline()))
    while is_unended_child(leader.pid):
        pass
    assert leader.returncode is None  # it was not reaped
    kill_session(leader.pid)
    psutil.wait_procs([orphan], timeout=10)
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
    assert leader.wait() == 3
    leader.stdout.close()
