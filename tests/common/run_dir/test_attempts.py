"""What a restart resumes from, by the record of attempts and the checkpoints."""

import json
import os

import pytest

from recipes.common.run_dir.attempts import (
    FILE,
    beats_of_newest,
    begin_attempt,
    end_attempt,
    read_attempts,
    sealed_step,
    seals,
)
from recipes.common.run_dir.heartbeat import Heartbeat
from tools.supervise.__main__ import flags_of_attempt


def test_a_restart_resumes_from_the_jobs_own_checkpoints(tmp_path):
    given = ["--out-dir", "x", "--resume-step", "100", "--skip", "3:5"]
    run_file = tmp_path / "run.json"
    run_file.write_text(json.dumps({"run_id": "earlier", "starts": [{}, {}]}))
    assert flags_of_attempt(given, tmp_path, "first") == given
    begin_attempt(tmp_path, 2, {"a": 2}, "first")
    (tmp_path / "checkpoints" / "step_00000200").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000200" / "checksums.json").touch()
    # the ranks died before they set the later checkpoint aside: --resume alone would resume from it
    assert flags_of_attempt(given, tmp_path, "rank_lost") == given
    begun = ({"run_id": "earlier", "starts": [{}, {}, {}]}, {"run_id": "afresh", "starts": [{}]}, "damaged")
    for content in begun:  # no clock is asked: the ranks' may be wrong
        run_file.write_text(json.dumps(content))
        assert flags_of_attempt(given, tmp_path, "rank_lost") == ["--out-dir", "x", "--skip", "3:5", "--resume"]
    assert flags_of_attempt(["--resume"], tmp_path, "asked") == ["--resume"]
    (tmp_path / "checkpoints" / "step_00000200" / "checksums.json").unlink()
    assert flags_of_attempt(["--resume"], tmp_path, "hang") == []
    assert (sealed_step(tmp_path), seals(tmp_path)) == (0, frozenset())


@pytest.mark.parametrize("cause", ["asked", "rank_lost"])
def test_a_job_that_was_only_ever_told_to_continue_continues(tmp_path, cause):
    """--continue from the first start on, or a record of the first start that a full disk swallowed."""
    begin_attempt(tmp_path, 2, {"a": 2}, "asked")
    (tmp_path / "checkpoints" / "step_00000200").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000200" / "checksums.json").touch()
    assert flags_of_attempt([], tmp_path, cause) == ["--resume"]


def test_a_seal_is_progress_whatever_its_time(tmp_path):
    """A run that went back seals a step below; a clock that was set back gives it an earlier time."""
    first = tmp_path / "checkpoints" / "step_00000200" / "checksums.json"
    first.parent.mkdir(parents=True)
    first.write_text("{}")
    before = seals(tmp_path)
    second = tmp_path / "checkpoints" / "step_00000100" / "checksums.json"
    second.parent.mkdir()
    second.write_text("{}")
    os.utime(second, (0, 0))
    assert seals(tmp_path) - before == {("step_00000100", 0, 2)}
    os.utime(first, (5, 5))  # the same step, sealed again
    assert len(seals(tmp_path) - before) == 2


def test_heartbeats_of_the_attempt_before_are_not_the_newest_ones(tmp_path):
    heart = Heartbeat(tmp_path, 0)
    heart.enter(7, "step")
    begin_attempt(tmp_path, 1, {"a": 1}, "rank_lost")
    assert beats_of_newest(tmp_path) == []
    Heartbeat(tmp_path, 0).enter(1, "data")
    assert [beat.step for beat in beats_of_newest(tmp_path)] == [1]


def test_damaged_lines_hide_no_other(tmp_path):
    """Zeroed by a power cut, cut by a kill, or of something else; and the metrics too."""
    assert begin_attempt(tmp_path, 2, {"a": 2}, "first") == 1
    end_attempt(tmp_path, 1, "rank_lost", "x")
    with (tmp_path / FILE).open("ab") as file:
        file.write(b"\0" * 64 + b"\n" + b'7\n{"event": "start"}\n{"event": "start", "attempt": 2, "cau')
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 3, "seconds": 1.0}\n\0\0\0\n{"step": 4, "seconds": 1.0}\n')
    assert begin_attempt(tmp_path, 2, {"a": 2}, "rank_lost") == 2
    assert end_attempt(tmp_path, 2, "finished", "")["lost_steps"] == 4
    assert [(record["event"], record["attempt"]) for record in read_attempts(tmp_path)] == [
        ("start", 1), ("end", 1), ("start", 2), ("end", 2),
    ]  # fmt: skip
