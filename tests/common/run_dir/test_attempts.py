"""What a restart resumes from, by the record of attempts and the checkpoints."""

import json
from datetime import UTC, datetime

from recipes.common.run_dir.attempts import begin_attempt, sealed_step, sealed_time
from tools.supervise.__main__ import flags_of_attempt


def test_a_restart_resumes_from_the_jobs_own_checkpoints(tmp_path):
    given = ["--out-dir", "x", "--resume-step", "100", "--skip", "3:5"]
    assert flags_of_attempt(given, tmp_path, "first") == given
    begin_attempt(tmp_path, 2, {"a": 2}, "first")
    (tmp_path / "checkpoints" / "step_00000200").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000200" / "checksums.json").touch()
    manifest = {"starts": [{"time": "2020-01-01T00:00:00+00:00"}]}
    (tmp_path / "run.json").write_text(json.dumps(manifest))
    # the ranks died before they set the later checkpoint aside: --resume alone would resume from it
    assert flags_of_attempt(given, tmp_path, "rank_lost") == given
    manifest["starts"].append({"time": datetime.now(UTC).isoformat(timespec="seconds")})
    (tmp_path / "run.json").write_text(json.dumps(manifest))
    assert flags_of_attempt(given, tmp_path, "rank_lost") == ["--out-dir", "x", "--skip", "3:5", "--resume"]
    assert flags_of_attempt(["--resume"], tmp_path, "asked") == ["--resume"]
    (tmp_path / "checkpoints" / "step_00000200" / "checksums.json").unlink()
    assert flags_of_attempt(["--resume"], tmp_path, "hang") == []
    assert (sealed_step(tmp_path), sealed_time(tmp_path)) == (0, 0.0)
