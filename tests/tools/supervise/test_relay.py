"""What a launcher prints reaches the screen whole, and a screen that is gone does not reach the launcher."""

import subprocess
import sys

from tests.support.tiny import ROOT

# the child has SIGPIPE as it comes, as ssh and pdsh have: into a pipe without a reader its first line would end it
PROGRAM = """
import subprocess, sys
from recipes.common.runtime.screen import keep_screen
from tools.supervise.relay import relayed
keep_screen()
with relayed():
    code = subprocess.call(["bash", "-c", "for i in $(seq 2000); do echo line $i; echo error $i >&2; done; exit 7"])
    print("the end", flush=True)
sys.exit(code)
"""


def start():
    return subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_all_lines_in_order():
    out, _ = (job := start()).communicate()
    lines = [text for i in range(1, 2001) for text in (f"line {i}", f"error {i}")]
    assert out.decode().splitlines() == [*lines, "the end"]
    assert job.returncode == 7


def test_without_a_reader_the_launcher_ends_as_it_would():
    job = start()
    job.stdout.readline()
    job.stdout.close()
    assert job.wait() == 7


HANGUP = """
import os, signal
from tools.supervise.stop_requests import StopRequests
stops = StopRequests()
stops.listen()
os.kill(os.getpid(), signal.SIGHUP)
os.kill(os.getpid(), signal.SIGTERM)
print(stops.times, stops.first_signal)
"""


def test_a_hangup_that_nohup_has_ignored_stays_ignored():
    for words, said in (([], "2 SIGHUP"), (["nohup"], "1 SIGTERM")):
        done = subprocess.run([*words, sys.executable, "-c", HANGUP], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.strip() == said
