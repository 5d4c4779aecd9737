"""Every second of a run is accounted for once, under what took it."""

import argparse
import json
import subprocess
import sys

import pytest

from recipes.common.recipe import ROOT
from recipes.common.run_dir.heartbeat import Beat
from tools.common.console import UsageError
from tools.throughput.goodput import EndCost, goodput, run

PHASES = {"start": 4.0, "data": 1.0, "step": 50.0, "log": 0.5, "evaluate": 2.0, "save": 0.5, "end": 0.0}  # 58 s
RECORDS = [
    # launched at 100, ranks there at 106, first step at 110; lost at 164, noticed and ended by 170
    {"event": "start", "attempt": 1, "time": 100.0, "resumed_step": 0, "cause": "first"},
    {"event": "end", "attempt": 1, "time": 170.0, "cause": "rank_lost", "last_beat": 164.0, "last_step": 100, "lost_steps": 20,
     "lost_seconds": 10.0, "phase_seconds": PHASES},
    # 5 s later; ranks there at 181, first step at 185, last beat at 239
    {"event": "start", "attempt": 2, "time": 175.0, "resumed_step": 80, "cause": "rank_lost"},
    {"event": "end", "attempt": 2, "time": 241.0, "cause": "finished", "last_beat": 239.0, "last_step": 180, "lost_steps": 0,
     "lost_seconds": 0.0, "phase_seconds": PHASES},
]  # fmt: skip


def test_every_second_is_counted_once():
    found = goodput(RECORDS)
    assert found.wall_seconds == 141.0
    assert found.training_seconds == 2 * 50.5 - 10.0
    assert (found.data_seconds, found.evaluating_seconds, found.saving_seconds) == (2.0, 4.0, 1.0)
    assert (found.first_start_seconds, found.finishing_seconds) == (10.0, 2.0)
    assert found.causes == {
        "rank_lost": EndCost(
            ends=1, lost_steps=20, lost_seconds=10.0, noticing_seconds=6.0, down_seconds=5.0, restarting_seconds=10.0
        )
    }
    parts = found.training_seconds + found.data_seconds + found.evaluating_seconds + found.saving_seconds
    parts += found.first_start_seconds + found.finishing_seconds + sum(cause.seconds for cause in found.causes.values())
    assert parts == pytest.approx(found.wall_seconds)
    assert (found.last_step, found.share) == (180, 91.0 / 141.0)


def test_an_attempt_that_runs_is_counted_up_to_now():
    beats = [Beat(rank, "a", 1, 150, "step", 239.0, 0.5, PHASES) for rank in (1, 0)]
    found = goodput(RECORDS[:-1], beats, now=241.0)
    assert found.last_step == 150
    assert (found.wall_seconds, found.training_seconds) == (141.0, 91.0)


def test_the_verb_reads_a_run(tmp_path, capsys):
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "attempts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS) + '{"cut')
    assert run(argparse.Namespace(run_dir=tmp_path, json=False)) == 0
    text = capsys.readouterr().out
    assert text.startswith("goodput 64.5 %, step 180\n")
    assert ["after", "rank_lost", "31.0", "22.0", "%"] in [line.split() for line in text.splitlines()]
    command = [sys.executable, "-m", "tools.throughput", "goodput", str(tmp_path), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["goodput"], result["causes"]["rank_lost"]["seconds"]) == (91.0 / 141.0, 31.0)
    with pytest.raises(UsageError, match="has no start; only runs started by launch"):
        run(argparse.Namespace(run_dir=tmp_path / "none", json=False))
