"""What people see of a run: a bar on a terminal, few lines elsewhere."""

from __future__ import annotations

import io
import math

import pytest

from recipes.common.run_dir import progress
from recipes.common.run_dir.progress import StepProgress, describe_step


def test_plain_lines_are_few_where_stderr_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    shown = StepProgress(10, 0, stream)
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    for step in range(1, 11):
        now[0] += 3.0
        shown.show({"step": step, "loss": 2.0, "lr": 1e-3, "grad_norm": 1.5, "tokens_per_second": 12_345.0})
    shown.close()
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "5/10", "9/10", "10/10"]
    assert lines[0] == "step 1/10 | loss 2.0000 | 12.3k tok/s | lr 1.00e-03 | grad norm 1.5"


def test_the_last_step_is_shown_wherever_the_run_stops() -> None:
    stream = io.StringIO()
    shown = StepProgress(10, 0, stream)
    for step in (1, 2, 3):
        shown.show({"step": step, "loss": 2.0})
    shown.close()
    assert stream.getvalue() == "step 1/10 | loss 2.0000\nstep 3/10 | loss 2.0000\n"


def test_a_terminal_gets_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    shown = StepProgress(10, 4, stream)
    shown.show({"step": 5, "loss": 2.5, "tokens_per_second": 9.0})
    shown.note("checkpoint saved")
    shown.close()
    text = stream.getvalue()
    assert "5/10" in text
    assert "loss 2.5000 | 9 tok/s" in text
    assert "checkpoint saved" in text


def test_what_people_see() -> None:
    record = {"step": 1, "loss": math.nan, "loss_scale": 65536.0, "skipped_steps": 2, "tokens_per_second": 2.5e6}
    assert describe_step(record) == "loss nan | 2.5M tok/s | scale 65536 | skipped 2"
    assert describe_step({"step": 0, "val_loss": 9.0, "skipped_steps": 0}) == "val loss 9.0000"
