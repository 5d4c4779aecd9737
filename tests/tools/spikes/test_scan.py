"""`tools.spikes scan` and `bench` as a user runs them: the JSON promised, several files, exit codes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.bench.spikes.detection import score_detection
from tests.support.synthetic_logs import bump, healthy_loss, healthy_norm, steps_of
from tools.common.console import FAILED, GOOD, MISTAKE
from tools.spikes.__main__ import main
from tools.spikes.compare import coincident

ROOT = Path(__file__).resolve().parents[3]
FIELDS = ["onset_step", "peak_step", "end_step", "delta", "class", "actionable", "first_signal", "lead_steps"]


def write_log(path, loss, every=1, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = np.stack([steps_of(len(loss), every), loss, *columns.values()], axis=1)
    np.savetxt(path, table, delimiter=",", header=",".join(["step", "loss", *columns]), comments="", fmt="%.6g")
    return path


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


@pytest.fixture
def labelled(tmp_path):
    """A folder of logs laid out like the real one, each with what its name stands for."""
    sparse = healthy_loss(7, 2000, 5) + bump(1000, 1.0, 2, 2000)
    write_log(tmp_path / "megatron_golden_history" / "mixtral_a.csv", sparse, every=5)
    write_log(tmp_path / "megatron_golden_history" / "gpt.csv", healthy_loss(8, 2000, 5), every=5)
    hard = healthy_loss(9) + bump(5000, 1.5, 1e-9)
    write_log(tmp_path / "llmc" / "gpt2.csv", hard, grad_norm=healthy_norm())
    rise = np.maximum(steps_of() - 4000, 0) * 2e-4
    for name, loss in (("14m-1", healthy_loss(1) + rise), ("70m-1", healthy_loss(2) + rise), ("410m-1", healthy_loss(3))):
        write_log(tmp_path / "polypythias" / f"{name}.csv.gz", loss)
    for seed in (4, 5):
        bad = bump(918, 1.5, 1e-9, 1500) + bump(946, 1.5, 1e-9, 1500)
        write_log(tmp_path / "modded_nanogpt" / f"x__ValueEmbed__{seed}.csv", healthy_loss(seed, 1500) + bad)
    rows = [
        ("mixtral", "megatron_golden_history/mixtral_a.csv", 5000, 5000, 1.0, 10, 30),
        ("llmc", "llmc/gpt2.csv", 5000, 5000, 1.5, 0, 30),
    ]
    header = "set,file,onset_step,peak_step,delta_loss,duration_steps,robust_z_at_peak\n"
    (tmp_path / "labels.csv").write_text(header + "".join(",".join(map(str, row)) + "\n" for row in rows))
    return tmp_path


def test_the_bench_scores_every_kind_of_log(labelled):
    scores = score_detection(labelled)
    assert [score.name for score in scores if not score.good] == []
    assert len(scores) == 11  # all but BLOOM, which is not there


def test_the_bench_fails_on_a_spike_that_is_not_seen(labelled):
    labels = labelled / "labels.csv"
    labels.write_text(labels.read_text().replace("mixtral_a.csv,5000", "mixtral_a.csv,6000"))
    missed = [score for score in score_detection(labelled) if not score.good]
    assert {score.name for score in missed} == {f"Mixtral spikes of {nats} nat or more, at their sample" for nats in (0.5, 0.3)}
    assert "not 6000" in missed[0].value


def test_the_bench_wants_labels(tmp_path, capsys):
    assert main(["bench", str(tmp_path)]) == MISTAKE
    assert "labels.csv" in capsys.readouterr().err


def test_the_bench_exits_1_when_a_goal_is_missed(labelled, capsys, monkeypatch):
    monkeypatch.setattr("tests.bench.spikes.detection.ALARMS_PER_1000", -1.0)
    assert main(["bench", "--json", "--only", "detection", str(labelled)]) == FAILED
    assert json.loads(capsys.readouterr().out)["good"] is False
