"""The record of a run: what is written is read, and whatever is done to an entry afterwards is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.common.config.json_files import JsonError
from recipes.common.run_dir.segments import append_segment, changed_facts, content_hash, read_chain, read_segments

PATCH_TEXT = b"-a\n+b\n"
FACTS = {
    "recipe.seed": 1,
    "recipe.layouts": {"2": {"tensor": 2}},
    "deepspeed.ratio": float("inf"),
    "git.patch": content_hash(PATCH_TEXT),
    "environment.NCCL_ALGO": "Ring \ud800ü",
}


def three(run_dir: Path) -> Path:
    for number, cause in enumerate(("start", "resume", "rewind")):
        append_segment(
            run_dir,
            cause=cause,
            step=10 * number,
            attempt=min(number + 1, 2),
            run_id="abc",
            facts=FACTS | {"recipe.seed": number},
            origins={"recipe.seed": "recipe"},
            patch=PATCH_TEXT,
        )
    return run_dir / "segments"


def test_entries_are_read_as_they_were_written_and_chained(tmp_path: Path) -> None:
    assert read_segments(tmp_path) == [] and read_chain(tmp_path) == ([], [])
    folder = three(tmp_path)
    first, second, third = segments = read_segments(tmp_path)
    assert read_chain(tmp_path) == (segments, [])
    assert [(s.index, s.cause, s.step, s.attempt) for s in segments] == [
        (1, "start", 0, 1),
        (2, "resume", 10, 2),
        (3, "rewind", 20, 2),
    ]
    assert (first.previous, second.previous, third.previous) == ("", first.hash, second.hash)
    assert second.facts == FACTS | {"recipe.seed": 1} and second.origins == {"recipe.seed": "recipe"}
    assert (folder / "00002.git.patch").read_bytes() == PATCH_TEXT
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert changed_facts(first.facts, second.facts) == ["recipe.seed"]


def test_another_runs_record_is_set_aside_at_a_start(tmp_path: Path) -> None:
    three(tmp_path)
    for kept in ("segments.before", "segments.before.2"):
        append_segment(tmp_path, cause="start", step=0, attempt=1, run_id="new", facts={})
        assert (tmp_path / kept / "00001.json").is_file()
        assert [s.run_id for s in read_segments(tmp_path)] == ["new"] and read_chain(tmp_path)[1] == []


def edited(folder: Path) -> None:
    path = folder / "00002.json"
    content = json.loads(path.read_text())
    content["facts"]["recipe.seed"] = 7
    path.write_text(json.dumps(content))


def edited_and_sealed_again(folder: Path) -> None:
    """Edit an entry and give it the hash that belongs to it, as whoever knows the format could."""
    run_dir = folder.parent / "forged"
    path = folder / "00002.json"
    append_segment(run_dir, cause="start", step=0, attempt=1, run_id="abc", facts={})
    append_segment(run_dir, cause="resume", step=10, attempt=2, run_id="abc", facts={"recipe.seed": 7})
    content = json.loads((run_dir / "segments" / "00002.json").read_text())
    path.write_text(json.dumps(content))


def reordered(folder: Path) -> None:
    one, two = ((folder / f"0000{n}.json").read_bytes() for n in (1, 2))
    (folder / "00001.json").write_bytes(two)
    (folder / "00002.json").write_bytes(one)


def renumbered(folder: Path) -> None:
    (folder / "00001.json").unlink()
    for number in (2, 3):
        (folder / f"0000{number}.json").rename(folder / f"0000{number - 1}.json")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (edited, ["00002.json was edited"]),
        (
            edited_and_sealed_again,
            [
                "00002.json does not follow 00001.json",
                "00002.json has another patch beside it",
                "00003.json does not follow 00002.json",
            ],
        ),
        (lambda folder: (folder / "00002.json").unlink(), ["00002.json is missing"]),
        (lambda folder: (folder / "00001.json").unlink(), ["00001.json is missing"]),
        (
            reordered,
            [
                "00001.json holds entry 2",
                "00001.json is not the first entry",
                "00002.json holds entry 1",
                "00002.json does not follow",
                "00003.json does not follow",
            ],
        ),
        (renumbered, ["00001.json holds entry 2", "00001.json is not the first entry", "00002.json holds entry 3"]),
        (lambda folder: (folder / "00003.git.patch").write_bytes(b"+c\n"), ["00003.json has another patch beside it"]),
    ],
    ids=["edited", "sealed again", "removed", "first removed", "reordered", "renumbered", "patch"],
)
def test_what_breaks_the_chain_is_named(damage: object, named: list[str], tmp_path: Path) -> None:
    damage(three(tmp_path))
    problems = read_chain(tmp_path)[1]
    assert len(problems) == len(named) and all(f"segments/{n}" in p for n, p in zip(named, problems, strict=True)), problems


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"\xff",
        b'{"version": 9}',
        b'{"version": 1}',
        b'{"version": 1, "index": "2"}',
        b'{"version": 1, "index": 2, "cause": "luck", "step": 10, "attempt": 2, "time": "", "run_id": "", "previous": "", '
        b'"hash": "", "facts": {}, "origins": {}}',
        b"[" * 100000,
    ],
)
def test_an_unreadable_entry_is_named_and_the_others_are_read(content: bytes, tmp_path: Path) -> None:
    folder = three(tmp_path)
    (folder / "00002.json").write_bytes(content)
    with pytest.raises(JsonError, match=r"segments/00002\.json cannot be read"):
        read_segments(tmp_path)
    segments, problems = read_chain(tmp_path)
    assert [s.index for s in segments] == [1, 3] and len(problems) == 1 and "00002.json cannot be read" in problems[0]
    (folder / "00003.json").write_bytes(content)
    append_segment(tmp_path, cause="resume", step=30, attempt=3, run_id="abc", facts=FACTS, patch=PATCH_TEXT)  # goes on behind
    assert [s.index for s in read_chain(tmp_path)[0]] == [1, 4] and len(read_chain(tmp_path)[1]) == 2


def test_values_that_are_equal_to_json_are_no_change() -> None:
    before = {"a": float("nan"), "b": {"x": 1, "y": [1, 2]}, "c": None}
    assert changed_facts(before, {"c": None, "b": {"y": [1, 2], "x": 1}, "a": float("nan")}) == []
    assert changed_facts(before, {"a": 0, "b": {"x": 1, "y": [2, 1]}, "d": None}) == ["a", "b", "d", "c"]
    assert changed_facts({"a": 1}, {"a": True}) == ["a"]  # other values to JSON
