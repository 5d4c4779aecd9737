"""What the machine refuses is told in one line with its cure, and is the user's to cure: exit 2."""

import errno
import os
import subprocess
import sys

import pytest

from recipes.common.config.json_files import JsonError
from tests.support.tiny import ROOT
from tools.common.console import FAILED, GOOD, MISTAKE, CheckError, UsageError, as_usage_error, exit_code


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EACCES, "give this user the right to it"),
        (errno.EROFS, "mounted read-only"),
        (errno.ENOSPC, "free some space there"),
        (errno.EDQUOT, "free some space there"),
        (errno.ENOENT, "correct the path"),
    ],
)
def test_what_the_machine_refuses_is_one_line(capsys, number, words):
    assert exit_code(raising(OSError(number, os.strerror(number), "/a/b"))) == MISTAKE
    said = capsys.readouterr().err
    assert said.startswith(f"error: /a/b: {os.strerror(number)}; ")
    assert words in said
    assert said.count("\n") == 1


def test_other_errors_stay_what_they_are(capsys):
    with pytest.raises(OSError, match="odd"):
        exit_code(raising(OSError(errno.EILSEQ, "odd")))
    assert exit_code(raising(UsageError("a"))) == MISTAKE
    assert exit_code(raising(CheckError("b"))) == FAILED
    assert exit_code(lambda: GOOD) == GOOD


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_has_seen_enough_ends_neither_the_work_nor_the_code(tmp_path, stream, flush):
    program = f"""
import sys
from tools.common.console import exit_code
def work():
    for letter in "xy":
        print(letter * 70_000, file=sys.{stream}, flush={flush})
    open({str(tmp_path / "done")!r}, "w")
    return 1
sys.exit(exit_code(work))
"""
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", '"$@" 2>&1 | head -c 10', "-", sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "x" * 10)
    assert (tmp_path / "done").exists()


def test_a_full_disk_under_stdout_is_no_success():
    program = "import sys; from tools.common.console import exit_code; sys.exit(exit_code(lambda: print('x') or 0))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: what is written: No space left on device; free some space")
    assert done.stderr.count("\n") == 1


def test_what_a_tool_prints_is_never_obeyed_by_a_terminal(capsys):
    """Names of runs, hosts, recipes and tensors, and texts of documents, come from files."""

    def work():
        print("name \x1b]0;title\x07 \x9b2J \u202eback\r", "tab\tstays")
        sys.stdout.flush()
        return GOOD

    assert exit_code(work) == GOOD
    assert capsys.readouterr().out == "name \\x1b]0;title\\x07 \\x9b2J \\u202eback\\r tab\tstays\n"
    assert exit_code(raising(JsonError("a.json: \x1b[31mred"))) == MISTAKE
    assert capsys.readouterr().err == "error: a.json: \\x1b[31mred\n"


def test_a_librarys_error_of_the_machine_has_its_cure_too():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/b")
    with pytest.raises(UsageError, match=r"^/a/b: No space left on device; free some space there"), as_usage_error(OSError):
        raise full
    with pytest.raises(UsageError, match=r"^in words$"), as_usage_error(OSError):
        raise FileNotFoundError("in words")
