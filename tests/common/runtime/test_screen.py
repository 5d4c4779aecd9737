"""What a process prints can be lost, and never ends it: closed, without a reader, on a full disk, on nothing at all."""

import os
import subprocess
import sys

import pytest

from tests.support.tiny import ROOT

PROGRAM = """
import os, sys, subprocess
from recipes.common.runtime.screen import keep_screen
keep_screen()
from tqdm import tqdm
for i in range(2000):
    print("a line that is longer than a few characters", i, flush=i % 2 == 0)
    print("another", file=sys.stderr)
bar = tqdm(range(10), file=sys.stderr)
for _ in bar:
    bar.write("a note", file=sys.stderr)
subprocess.run([sys.executable, "-c", "print(1, flush=True)"])
number = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
assert number > 2, number
os.write(number, b"went on")
"""


def run(path, **options):
    command = [sys.executable, "-c", PROGRAM, str(path)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, **options)


def shell(path, redirect):
    return subprocess.Popen(["bash", "-c", f'exec "$0" -c "$1" "$2" {redirect}', sys.executable, PROGRAM, str(path)], cwd=ROOT)


@pytest.mark.parametrize("redirect", [">&- 2>&-", "> /dev/full 2>&1", "2>&- > /dev/null", "> >(exec true) 2>&1", "<&- >&- 2>&-"])
def test_training_goes_on_without_its_screen(tmp_path, redirect):
    assert shell(tmp_path / "out", redirect).wait() == 0
    assert (tmp_path / "out").read_text() == "went on"


def test_a_reader_that_leaves_early(tmp_path):
    job = run(tmp_path / "out", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert job.stdout.readline().startswith(b"a line")
    job.stdout.close()  # as `head -1`
    assert job.wait() == 0
    assert (tmp_path / "out").read_text() == "went on"


def test_a_terminal_that_is_closed(tmp_path):
    ours, theirs = os.openpty()
    job = run(tmp_path / "out", stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.read(ours, 10)
    os.close(ours)
    assert job.wait() == 0
    assert (tmp_path / "out").read_text() == "went on"


def test_what_can_be_shown_is_shown(tmp_path):
    job = run(tmp_path / "out", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, error = job.communicate()
    assert out.count(b"a line that") == 2000
    assert out.endswith(b"1\n")
    assert error.count(b"another") == 2000
