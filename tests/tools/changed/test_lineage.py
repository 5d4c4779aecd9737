"""`changed lineage` shows the chain of a run and names whatever breaks it, the newest entry's removal included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from recipes.common.run_dir.run_files import note_segment
from recipes.common.run_dir.segments import append_segment
from tests.support.small_runs import call


def record(run_dir: Path) -> Path:
    """Write a run's record: a start, a resume, and a rewind in that."""
    run_dir.mkdir()
    manifest = {"run_id": "abc", "name": "tiny", "starts": []}
    for number, (cause, attempt) in enumerate((("start", 1), ("resume", 2), ("rewind", 2))):
        if cause != "rewind":
            manifest["starts"].append({"resumed_step": 4 * number or None})
            (run_dir / "run.json").write_text(json.dumps(manifest))
        facts = {"recipe.seed": 1, "recipe.steps": 9 + (number > 0), "run.skips": [[0, 4]] if cause == "rewind" else []}
        segment = append_segment(run_dir, cause=cause, step=4 * number, attempt=attempt, run_id="abc", facts=facts)
        note_segment(run_dir, segment.hash)
        manifest = json.loads((run_dir / "run.json").read_text())
    return run_dir


def seal_anew(folder: Path) -> None:
    """Replace the newest entry by another with a right hash."""
    (folder / "00003.json").unlink()
    append_segment(folder.parent, cause="rewind", step=8, attempt=2, run_id="abc", facts={"recipe.seed": 2})


def edit(folder: Path) -> None:
    text = (folder / "00002.json").read_text()
    (folder / "00002.json").write_text(text.replace('"recipe.steps": 10', '"recipe.steps": 11'))


def test_an_unbroken_chain_here_and_moved(tmp_path: Path) -> None:
    run = record(tmp_path / "run")
    shutil.copytree(run, tmp_path / "moved")
    for folder in (run, tmp_path / "moved"):
        shown = call("changed", "lineage", folder)
        assert shown.code == 0 and shown.out.endswith("the chain is unbroken: 3 entries\n"), shown
    told = call("changed", "lineage", run, "--json").json
    assert told["unbroken"] and told["problems"] == told["remarks"] == []
    assert [(s["cause"], s["step"], s["attempt"], s["changed"]) for s in told["segments"]] == [
        ("start", 0, 1, []),
        ("resume", 4, 2, ["recipe.steps"]),
        ("rewind", 8, 2, ["run.skips"]),
    ]


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (edit, "00002.json was edited"),
        (lambda folder: (folder / "00001.json").unlink(), "00001.json is missing"),
        (lambda folder: (folder / "00003.json").unlink(), "that start 2 of run.json names: removed"),
        (seal_anew, "that start 2 of run.json names: removed, edited or sealed anew"),
        (shutil.rmtree, "that start 1 of run.json names"),
        (lambda folder: (folder / "00002.json").write_text("{"), "00002.json cannot be read"),
    ],
    ids=["edited", "first", "newest", "sealed anew", "all", "damaged"],
)
def test_what_breaks_it_is_named(damage: object, named: str, tmp_path: Path) -> None:
    damage(record(tmp_path / "run") / "segments")
    shown = call("changed", "lineage", tmp_path / "run")
    assert shown.code == 1 and named in shown.out and "unbroken" not in shown.out, shown


def test_what_need_not_be_there_is_a_note(tmp_path: Path) -> None:
    run = record(tmp_path / "run")
    manifest = json.loads((run / "run.json").read_text())
    manifest["starts"].append({"resumed_step": 8})  # its record failed
    (run / "run.json").write_text(json.dumps(manifest))
    shown = call("changed", "lineage", run)
    assert shown.code == 0 and "note: start 3 of run.json has no entry" in shown.out
    (run / "run.json").write_text("{")
    assert "run.json is not there or damaged" in call("changed", "lineage", run).out


def test_another_runs_entry_and_no_record(tmp_path: Path) -> None:
    run = record(tmp_path / "run")
    other = json.loads((run / "run.json").read_text()) | {"run_id": "def"}
    (run / "run.json").write_text(json.dumps(other))
    assert "segments/00001.json is of another run" in call("changed", "lineage", run).out
    (tmp_path / "old").mkdir()
    nothing = call("changed", "lineage", tmp_path / "old")
    assert nothing.code == 2 and "has no record" in nothing.err
