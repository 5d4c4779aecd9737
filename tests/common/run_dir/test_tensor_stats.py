"""Columns on disk: read back equal, whole up to the last record after a kill, and without what a resume went back over."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from recipes.common.run_dir import tensor_stats
from recipes.common.run_dir.tensor_stats import ACTIVATIONS, FOLDER, PARAMETERS, StatsWriter, read_stats

ROOT = Path(__file__).resolve().parents[3]
NAMES = ("model.embed_tokens.weight", "model.norm.weight")


def record(step, mark=0.0):
    return {"grad_norm": np.array([step, mark]), "zero_share": np.array([np.nan, -step])}


def write(folder, steps, mark=0.0, resumed_step=None):
    writer = StatsWriter(folder, PARAMETERS, NAMES, resumed_step)
    for step in steps:
        writer.append(step, record(step, mark))
    writer.close()


def test_what_is_read_is_what_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_stats, "FILE_STEPS", 4)
    write(tmp_path, range(1, 11))
    layers = StatsWriter(tmp_path, ACTIVATIONS, ("0", "2"))
    layers.append(5, {"activation_rms": np.array([0.5, 1.5])})
    stats = read_stats(tmp_path, 3, 9)
    assert len(list((tmp_path / FOLDER).glob("parameters_*"))) == 3
    assert stats.names == NAMES
    assert stats.steps.tolist() == [3, 4, 5, 6, 7, 8, 9]
    assert stats.values["grad_norm"].tolist() == [[step, 0.0] for step in range(3, 10)]
    assert np.isnan(stats.values["zero_share"][:, 0]).all()
    assert stats.layers == (0, 2)
    assert stats.activation_steps.tolist() == [5]
    assert stats.activations["activation_rms"].tolist() == [[0.5, 1.5]]


def test_a_range_without_records_is_empty(tmp_path):
    write(tmp_path, [1, 2])
    stats = read_stats(tmp_path, 5, 9)
    assert len(stats.steps) == 0
    assert stats.values["grad_norm"].shape == (0, 2)


def test_a_run_without_statistics_says_why(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"monitor was off"):
        read_stats(tmp_path, 1, 2)


def test_every_cut_of_a_piece_keeps_the_whole_records_before_it(tmp_path):
    write(tmp_path, [1, 2, 3])
    (piece,) = (tmp_path / FOLDER).iterdir()
    whole, kept = piece.read_bytes(), []
    for length in range(0, len(whole), 7):
        piece.write_bytes(whole[:length])
        stats = read_stats(tmp_path, 1, 3)
        kept.append(len(stats.steps))
        assert stats.steps.tolist() == [1, 2, 3][: len(stats.steps)]
    assert kept == sorted(kept)
    assert set(kept) == {0, 1, 2}


def test_kill_9_loses_no_record_that_was_appended(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from tests.common.run_dir.test_tensor_stats import *\n"
        "writer = StatsWriter(Path(sys.argv[1]), PARAMETERS, NAMES)\n"
        "for step in range(1, 6): writer.append(step, record(step))\n"
        "print('written', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as child:
        assert child.stdout.readline() == b"written\n"
        child.send_signal(signal.SIGKILL)
    assert read_stats(tmp_path, 1, 9).steps.tolist() == [1, 2, 3, 4, 5]


def test_a_resume_replaces_the_steps_that_it_repeats(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_stats, "FILE_STEPS", 4)
    write(tmp_path, range(1, 11))
    write(tmp_path, [], resumed_step=6)
    assert read_stats(tmp_path, 1, 99).steps.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]  # nothing new yet
    for mark, last in ((1.0, 12), (2.0, 8)):
        write(tmp_path, range(7, last + 1), mark, resumed_step=6)
        stats = read_stats(tmp_path, 1, 99)
        assert stats.steps.tolist() == list(range(1, last + 1))
        assert stats.values["grad_norm"][:, 1].tolist() == [0.0] * 6 + [mark] * (last - 6)
    write(tmp_path, [1, 2], 3.0)
    assert read_stats(tmp_path, 1, 99).values["grad_norm"][:, 1].tolist() == [3.0, 3.0]
    aside = sorted(path.name for path in (tmp_path / FOLDER).glob("*after_step*"))
    assert "parameters_00000009.arrow.after_step_00000006" in aside  # nothing is deleted
    assert len(list((tmp_path / FOLDER).iterdir())) == len(aside) + 1


def test_after_a_full_disk_the_next_record_is_whole(tmp_path):
    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    writer = StatsWriter(tmp_path, PARAMETERS, NAMES)
    writer.append(1, record(1))
    writer._file.close()
    writer._file = Full()
    with pytest.raises(OSError, match="No space"):
        writer.append(2, record(2))
    writer.append(3, record(3))
    assert read_stats(tmp_path, 1, 9).steps.tolist() == [1, 3]
