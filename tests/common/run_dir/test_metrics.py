"""metrics.jsonl survives kills, resumes and a full disk."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.common.recipe import ROOT
from recipes.common.run_dir.metrics import MetricsWriter, encode, read_metrics, rewind_metrics


def open_metrics(folder: Path, resumed_step: int | None = None, notes: list[str] | None = None) -> MetricsWriter:
    return MetricsWriter(folder, resumed_step, [].append if notes is None else notes.append)


def steps_in(path: Path) -> list[int]:
    return [record["step"] for record in read_metrics(path)]


def test_lines_read_back_equal(tmp_path: Path) -> None:
    records = [
        {"step": 1, "loss": 1 / 3, "lr": 5e-324, "grad_norm": 1.7976931348623157e308, "tokens": 2**60, "note": "Ω\n"},
        {"step": 2, "loss": math.nan, "lr": math.inf, "grad_norm": -math.inf, "loss_scale": None},
    ]
    log = open_metrics(tmp_path)
    for record in records:
        log.append(record)
    found = list(read_metrics(tmp_path))
    assert found[0] == records[0]
    assert math.isnan(found[1].pop("loss"))
    assert found[1] == {key: value for key, value in records[1].items() if key != "loss"}
    log.close()


def test_every_line_is_plain_json() -> None:
    def refuse(name: str) -> None:
        raise ValueError(name)

    line = encode({"step": 1, "loss": math.nan, "norm": math.inf})
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "loss": "NaN", "norm": "Infinity"}
    assert line.count(b"\n") == 1


def test_kill_9_loses_one_line_at_most(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from recipes.common.run_dir.metrics import MetricsWriter\n"
        f"log = MetricsWriter(Path({str(tmp_path)!r}), None, print)\n"
        "for step in range(1, 10**9):\n"
        "    log.append({'step': step, 'loss': 1 / step})\n"
        "    print(step, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    for _ in range(500):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    printed = 500 + len(process.stdout.read().splitlines())
    process.wait()
    found = steps_in(tmp_path)
    assert found == list(range(1, len(found) + 1))
    assert printed - 1 <= len(found) <= printed + 1  # the last line of stdout may be truncated, the last step not yet printed


def test_a_resume_moves_later_steps_aside(tmp_path: Path) -> None:
    log = open_metrics(tmp_path)
    for step in range(8):
        log.append({"step": step, "loss": 8.0 - step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 8, "lo')  # truncated by a kill
    notes: list[str] = []
    log = open_metrics(tmp_path, 5, notes)
    log.append({"step": 6, "loss": 0.5})
    log.close()
    assert steps_in(tmp_path) == [0, 1, 2, 3, 4, 5, 6]
    aside = tmp_path / "metrics.after_step_00000005.jsonl"
    assert aside.read_bytes().splitlines() == [
        b'{"step": 6, "loss": 2.0}',
        b'{"step": 7, "loss": 1.0}',
        b'{"step": 8, "lo',
    ]
    assert notes == [f"metrics.jsonl: later steps of an earlier process are now in {aside.name}"]
    # once more from the same step: the first attempt's lines stay
    open_metrics(tmp_path, 5).close()
    assert len(aside.read_bytes().splitlines()) == 4
    assert steps_in(tmp_path) == [0, 1, 2, 3, 4, 5]


def test_a_resume_with_nothing_to_move_changes_nothing(tmp_path: Path) -> None:
    assert rewind_metrics(tmp_path, 5) == (None, None)
    log = open_metrics(tmp_path)
    log.append({"step": 1, "loss": 1.0})
    log.close()
    before = (tmp_path / "metrics.jsonl").stat()
    assert rewind_metrics(tmp_path, 1) == (None, None)
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before.st_ino
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_fresh_start_in_a_used_directory_keeps_the_old_lines_aside(tmp_path: Path) -> None:
    for loss in (1.0, 2.0):
        log = open_metrics(tmp_path)
        log.append({"step": 0, "val_loss": loss})
        log.close()
    assert [record["val_loss"] for record in read_metrics(tmp_path)] == [2.0]
    assert [record["val_loss"] for record in read_metrics(tmp_path / "metrics.after_step_00000000.jsonl")] == [1.0]


def test_damaged_lines_are_set_aside_and_the_start_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    bad = [b"\0" * 40 + b"\n", b'{"step": 2, "lo{"step": 3}\n', b"7\n", b'{"step": "4"}\n', b'{"step": null}\n', b"\xff\n"]
    bad += [b"[" * 100_000 + b"\n", b"\n"]
    good = [b'{"step": 1}\n', b'{"step": 5}\n']
    path.write_bytes(good[0] + b"".join(bad) + good[1] + b'{"step": 9}\n')
    assert [record["step"] for record in read_metrics(path, skip_damaged=True)] == [1, 5, 9]
    notes: list[str] = []
    log = open_metrics(tmp_path, 5, notes)
    log.append({"step": 6})
    log.close()
    assert steps_in(tmp_path) == [1, 5, 6]
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == b"".join(bad)
    assert (tmp_path / "metrics.after_step_00000005.jsonl").read_bytes() == b'{"step": 9}\n'
    assert notes[1:] == ["metrics.jsonl: damaged lines are now in metrics.damaged.jsonl"]


def test_a_bad_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not a record of a step"):
        steps_in(path)


FULL_FOR_A_WHILE = """
import resource, sys
from pathlib import Path
from recipes.common.run_dir.metrics import MetricsWriter, read_metrics
out_dir = Path(sys.argv[1])
log = MetricsWriter(out_dir, None, lambda text: print(text, file=sys.stderr))
log.append({"step": 1, "loss": 1.0})
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
size = (out_dir / "metrics.jsonl").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 7, hard))  # the kernel takes 7 more bytes, then refuses
for step in (2, 3):
    log.append({"step": step, "loss": 1.0})
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
log.append({"step": 4, "loss": 1.0})
log.close()
print([record["step"] for record in read_metrics(out_dir / "metrics.jsonl")])
"""


def test_lines_wait_in_memory_while_the_disk_takes_none(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL_FOR_A_WHILE, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[1, 2, 3, 4]", done.stderr
    assert done.stderr.count("its lines wait in memory") == 1
