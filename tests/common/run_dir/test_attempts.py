"""What a restart resumes from, by the record of attempts and the checkpoints."""

import json

import pytest

from recipes.common.run_dir.attempts import begin_attempt, sealed_step, sealed_time
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
    assert (sealed_step(tmp_path), sealed_time(tmp_path)) == (0, 0.0)


@pytest.mark.parametrize("cause", ["asked", "rank_lost"])
def test_a_job_that_was_only_ever_told_to_continue_continues(tmp_path, cause):
    """--continue from the first start on, or a record of the first start that a full disk swallowed."""
    begin_attempt(tmp_path, 2, {"a": 2}, "asked")
    (tmp_path / "checkpoints" / "step_00000200").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000200" / "checksums.json").touch()
    assert flags_of_attempt([], tmp_path, cause) == ["--resume"]
