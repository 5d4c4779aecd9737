"""Heartbeats on disk."""

import itertools
import os
import time

from recipes.common.run_dir.heartbeat import Heartbeat, beat_files, read_beats


def test_heartbeats_are_read_back_and_old_ones_left_out(tmp_path, monkeypatch):
    clock = itertools.count(0, 0.5)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    wild = itertools.cycle([1e9, -5.0, 0.0])  # a clock that is set decides nothing
    monkeypatch.setattr(time, "time", lambda: next(wild))
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
    before = beat_files(tmp_path)
    assert read_beats(tmp_path, before) == []
    heart.enter(3, "data")
    assert [(b.rank, b.step) for b in read_beats(tmp_path, before)] == [(0, 3)]
