"""When one rank fails, the job ends at once, and that rank's own traceback is the last one on the screen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.common.runtime.exits import FAILED, NUMBERS, UNSAVED, TrainingError, UnsavedError, guard_rank
from tests.support.launched import PROGRAMS, copy_repository, deepspeed, losses, start, train_as_started
from tests.support.tiny import ROOT
from tools.common.forked_ranks import run_ranks

# rank 1 fails in its fourth step; rank 0 sees nothing but a peer that is gone
FAULT = """
import os  # noqa
from recipes.common.data.prefetcher import Prefetcher  # noqa

def _fail(self, consumed, global_seqs, read=Prefetcher.next):
    if os.environ["RANK"] == "1" and consumed >= 12:
        raise LookupError("planted: this shard is unreadable")
    return read(self, consumed, global_seqs)

Prefetcher.next = _fail
"""


def test_a_rank_that_raises_takes_the_job_down(warm, tmp_path):
    """Started as a module. Until the fault it trains what forked ranks do without a launcher."""
    recipe_file = copy_repository(tmp_path, extra=FAULT)
    run_ranks(train_as_started, 2, recipe_file, ["--out-dir", tmp_path / "forked", "--max-steps", 2])
    words = ["--module", "recipes.quickstart", "--out-dir", tmp_path / "run"]
    launcher, *flags = deepspeed(2, *words)
    process = start([warm, "-u", PROGRAMS / launcher, *flags], tmp_path / "repository")
    output, _ = process.communicate(timeout=300)  # rank 0 alone would wait for its peer for half an hour
    assert process.returncode != 0
    saved = tmp_path / "run" / "logs" / "rank_1.traceback"
    assert "Traceback (most recent call last)" in output, output
    last = output[output.rindex("Traceback (most recent call last)") :]
    assert "LookupError: planted: this shard is unreadable" in last
    assert saved.read_text() in output
    assert "rank 1 failed; its traceback:" in output
    assert "rank 0 stopped: rank_1 failed first" in output
    assert [path.name for path in saved.parent.glob("*.traceback")] == [saved.name]
    forked = losses(tmp_path / "forked")
    assert losses(tmp_path / "run")[:2] == forked and len(forked) == 2


def test_a_guarded_rank_leaves_its_traceback_and_nothing_from_an_earlier_start(tmp_path):
    """The process ends at once with code 1, so the caller gets no answer from it."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_0.traceback").write_text("of an earlier start")
    assert run_ranks(_succeed, 1, tmp_path) == ["done"]
    assert list((tmp_path / "logs").iterdir()) == []


def _succeed(out_dir):
    with guard_rank(out_dir, 0):
        return "done"


REFUSED = """
import pathlib, sys
from recipes.common.runtime.exits import guard_rank, refusals
errors = {"disk": OSError(28, "No space left on device", "/a/b"), "mine": LookupError("a; b"), "other": ValueError("bug")}
with guard_rank(pathlib.Path(sys.argv[2]), 0), refusals(0, print, LookupError):
    raise errors[sys.argv[1]]
"""


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        ("disk", 2, "error: /a/b: No space left on device; free some space there, and start again\n"),
        ("mine", 2, "error: a; b\n"),
        ("other", 1, None),
    ],
)
def test_what_only_a_start_finds_is_one_line_where_the_user_can_cure_it(tmp_path, what, code, said):
    done = subprocess.run([sys.executable, "-c", REFUSED, what, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code
    assert done.stderr == said or (said is None and "ValueError: bug" in done.stderr)


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [
        (UnsavedError("step 20 is not on disk"), UNSAVED, "unsaved"),
        (TrainingError("loss is nan"), NUMBERS, "training_error"),
        (MemoryError("x"), FAILED, "failed"),
    ],
)
def test_every_error_has_its_exit_code_where_nothing_can_be_written(tmp_path, error, code, word):
    """The folder is a file, and stderr is closed: the code and the report are all that is left, and they are right."""
    (tmp_path / "logs").write_text("in the way")
    child = os.fork()
    if child == 0:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w")
        with guard_rank(tmp_path, 0, lambda *words: Path(tmp_path / "report").write_text(" ".join(words))):
            raise error
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
    assert (tmp_path / "report").read_text().startswith(f"{word} ")
