"""`tools.spikes scan` as a user runs it: the JSON promised, several files, exit codes; and spikes that fall together."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.synthetic_logs import bump, healthy_loss, write_log
from tools.common.console import GOOD, MISTAKE, printable
from tools.common.logs.reader import read_logs
from tools.spikes.__main__ import main
from tools.spikes.compare import coincident

ROOT = Path(__file__).resolve().parents[3]
FIELDS = ["onset_step", "peak_step", "end_step", "delta", "class", "actionable", "first_signal", "lead_steps"]


@pytest.fixture
def spiky(tmp_path):
    return write_log(tmp_path / "spiky.csv", healthy_loss(points=3000) + bump(2000, 2.0, 10, 3000), lr=np.full(3000, 1e-3))


@pytest.fixture
def healthy(tmp_path):
    return write_log(tmp_path / "healthy.csv", healthy_loss(points=3000))


def test_one_file_is_one_object_with_the_promised_fields(spiky, capsys):
    assert main(["scan", "--json", str(spiky)]) == GOOD
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["file", "points", "events"]
    assert (found["file"], found["points"], len(found["events"])) == (str(spiky), 3000, 1)
    event = found["events"][0]
    assert list(event) == FIELDS
    assert (event["onset_step"], event["peak_step"], event["class"], event["actionable"]) == (2000, 2000, "fast_recovery", True)


def test_a_loss_that_is_not_finite_is_valid_json(tmp_path, capsys):
    loss = healthy_loss(points=3000)
    loss[2000] = np.nan
    assert main(["scan", "--json", str(write_log(tmp_path / "log.csv", loss))]) == GOOD
    event = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["events"][0]
    assert (event["delta"], event["class"], event["onset_step"]) == (None, "precision", 2000)


def test_several_files_are_scanned_in_order_in_several_processes(spiky, healthy):
    """As a script, from elsewhere: the processes it starts must find the repository too."""
    command = [sys.executable, str(ROOT / "tools" / "spikes"), "scan", "--json", str(spiky), str(healthy)]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert done.returncode == GOOD, done.stderr
    files = json.loads(done.stdout)["files"]
    assert [(file["file"], len(file["events"])) for file in files] == [(str(spiky), 1), (str(healthy), 0)]


def test_the_table_marks_what_is_actionable(spiky, healthy, capsys):
    assert main(["scan", str(spiky)]) == GOOD
    shown = capsys.readouterr().out
    assert (
        re.search(r"\n!\s+2000\s+2000\s+20\d\d\s+\+\d\.\d+\s+fast_recovery\s+loss\b", shown) and "1 events, 1 actionable" in shown
    )
    assert main(["scan", str(healthy)]) == GOOD
    assert "no events" in capsys.readouterr().out


@pytest.mark.parametrize("names", [["gone.csv"], ["gone.csv", "gone2.csv"]])
def test_a_file_that_is_not_there_is_the_users_mistake(tmp_path, capsys, names):
    assert main(["scan", *(str(tmp_path / name) for name in names)]) == MISTAKE
    error = capsys.readouterr().err
    assert all(name in error for name in names) and error.count("\n") == 1


SAME_DATA, OTHER = [918, 946, 1200], [100, 300, 500]


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        (SAME_DATA, SAME_DATA, "data"),
        (SAME_DATA, [918, 946], "data"),
        (SAME_DATA, OTHER, "dynamics"),
        ([918], [919], "cannot tell"),
        ([], SAME_DATA, "cannot tell"),
        (range(0, 1500, 2), range(0, 1500, 3), "cannot tell"),  # so many that they must meet
    ],
)
def test_spikes_that_fall_together_are_the_data(a, b, verdict):
    found = coincident(a, b, 1500)
    assert found.verdict == verdict and found.verdict == coincident(b, a, 1500).verdict
    assert set(found.shared) == set(a) & set(b)


def test_what_a_terminal_obeys_is_shown_escaped(tmp_path, capfd):
    """A table's run names itself with an escape sequence, and so does a file that is no log."""
    hostile = "a\x1b]0;owned\x07\x9b31m"
    (tmp_path / "log.csv").write_text("step,loss,run\n" + "".join(f"{step},2.5,{hostile}\n" for step in range(1, 9)))
    (tmp_path / f"{hostile}.txt").write_text(f"{hostile}\n")
    assert main(["scan", str(tmp_path / "log.csv")]) == GOOD
    assert main(["scan", str(tmp_path / f"{hostile}.txt")]) == MISTAKE
    out, err = capfd.readouterr()
    assert not {"\x1b", "\x07", "\x9b"} & set(out + err) and "a\\x1b]0;owned\\x07" in err
    assert printable("ab\n\tc\u202e\r") == "ab\n\tc\\u202e\\r"


@pytest.mark.parametrize("value", [0.0, -1.0, 1e300])
def test_a_scan_of_any_loss_is_good(tmp_path, capsys, value):
    assert main(["scan", "--json", str(write_log(tmp_path / "log.csv", np.full(300, value)))]) == GOOD
    json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


RUN_LINES = "".join(f'{{"step": {step}, "loss": {2 + step % 7 / 100 + 3 * (200 <= step < 206)}}}\n' for step in range(1, 301))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\0\0\0\n" + b'{"event": "start", "resumed_step": 150}\n', "line 1: damaged: no JSON"),
        (b'{"event": "start", "resumed_step": 150}\n{"resumed_step": "x"}\n{"resumed_step": [1]}\n', 'line 2: resumed_step="x"'),
        (b'{"resumed_step": 1e400}\n\xff\xfe\n[]\n{"resumed_step": 150}\n', "line 1: resumed_step=Infinity: must be a step"),
    ],
)
def test_damaged_lines_of_attempts_are_named_once_and_left_out(tmp_path, capsys, content, words):
    (tmp_path / "metrics.jsonl").write_text(RUN_LINES)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "attempts.jsonl").write_bytes(content)
    assert read_logs(tmp_path)[0].resumes == (150,)
    for arguments in (["scan", "--json", tmp_path], ["compare", "--json", tmp_path, tmp_path]):
        assert main([str(word) for word in arguments]) == GOOD
        told = capsys.readouterr()
        assert json.loads(told.out)
        assert told.err.count("\n") == 1 and words in told.err and str(tmp_path / "logs" / "attempts.jsonl") in told.err


@pytest.mark.parametrize("run", ["{}", '{"starts": []}', '{"starts": [5]}', '{"starts": 5}'])
def test_a_run_file_that_is_not_laid_out_as_such_is_named_by_compare(tmp_path, capsys, run):
    (tmp_path / "metrics.jsonl").write_text(RUN_LINES)
    (tmp_path / "run.json").write_text(run)
    assert main(["compare", str(tmp_path), str(tmp_path)]) == MISTAKE
    error = capsys.readouterr().err
    assert f"{tmp_path / 'run.json'}: not laid out" in error and error.count("\n") == 1
