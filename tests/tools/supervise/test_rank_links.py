"""Real ranks with real guards, connected to a supervisor."""

import os
import subprocess
import sys
import time

from recipes.common.recipe import ROOT
from recipes.common.runtime.supervisor_link import SUPERVISOR
from tools.supervise.rank_links import RankEvent, RankLinks

RANK = """
import os, sys, time
sys.path.insert(0, {root!r})
from recipes.common.runtime.supervisor_link import SupervisorLink
link = SupervisorLink(3)
{work}
"""


def start_rank(address: str, work: str) -> subprocess.Popen:
    program = RANK.format(root=str(ROOT), work=work)
    return subprocess.Popen([sys.executable, "-c", program], env={**os.environ, SUPERVISOR: address})


def collect(links: RankLinks, kind: str, seconds: float = 20.0) -> RankEvent:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for found in links.poll(0.1):
            if found.kind == kind:
                return found
    raise AssertionError(f"no {kind} in {seconds} s")


def test_a_rank_reports_its_exit_and_stacks_and_dies_with_its_supervisor():
    links = RankLinks()
    address = f"127.0.0.1:{links.port}:{links.token}"
    ended = start_rank(address, "link.report_exit('training_error', 'loss is nan'); os._exit(3)")
    found = collect(links, "end")
    assert (found.rank, found.word, found.detail) == (3, "training_error", "loss is nan")
    assert ended.wait() == 3

    stuck = start_rank(address, "def stuck_here(): time.sleep(1000)\nstuck_here()")
    collect(links, "hello")
    time.sleep(0.5)  # into the sleep
    links.send("stacks")
    assert "in stuck_here" in collect(links, "stacks").detail
    links.close()
    assert stuck.wait(timeout=5) == -9

    stranger = RankLinks(token="another")
    rejected = start_rank(f"127.0.0.1:{stranger.port}:{links.token}", "time.sleep(1000)")
    while rejected.poll() is None:
        assert stranger.poll(0.1) == []
    stranger.close()
