"""Heartbeats on disk."""

import itertools
import os
import time

from recipes.common.run_dir.heartbeat import Heartbeat, read_beats


def test_heartbeats_are_read_back_and_old_ones_left_out(tmp_path, monkeypatch):
    clock = itertools.count(time.time() - 100, 0.5)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    for rank in (1, 0):
        heart = Heartbeat(tmp_path, rank)
        heart.enter(1, "data")
        heart.enter(1, "step")
        heart.enter(2, "data")
    beats = read_beats(tmp_path)
    assert [(b.rank, b.step, b.phase, b.pid) for b in beats] == [(0, 2, "data", os.getpid()), (1, 2, "data", os.getpid())]
    assert beats[0].step_seconds == 1.0
    assert {name: seconds for name, seconds in beats[0].phase_seconds.items() if seconds} == {
        "start": 1.0,
        "data": 0.5,
        "step": 0.5,
    }
    (tmp_path / "logs/heartbeat/rank_00001.json").write_text("{cut")
    assert [b.rank for b in read_beats(tmp_path)] == [0]
    assert read_beats(tmp_path, since=time.time() + 200) == []
