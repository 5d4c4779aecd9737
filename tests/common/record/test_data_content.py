"""What lies in a data folder is known to the byte; reading it once is enough, and what was not read is said not to be."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import pytest

from recipes.common.record import data_content
from recipes.common.record.data_content import KNOWN, PREPARED, READ, REMEMBERED, WRITTEN, data_facts, folder_names
from recipes.common.run_dir.segments import changed_facts
from tests.support.tiny import write_shards

SHARD = "data.tokens.train_00000"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path / "tokens", tokens=4000)
    return tmp_path / "tokens"


def facts_of(folder: Path, seconds: float = math.inf, spare: Path | None = None) -> tuple[dict, dict]:
    return data_facts({"tokens": folder}, folder / "tokenizer", spare, seconds=seconds)


def change_byte(path: Path, *, keep_times: bool = False) -> None:
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))
    if keep_times:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_folder_its_shards_and_its_tokenizer(folder: Path) -> None:
    facts, origins = facts_of(folder)
    prepared = json.loads((folder / "dataset.json").read_text())["splits"]["train"]["shards"][0]["checksums"]
    assert facts[SHARD] == prepared["train_00000.bin"] and origins[SHARD] == READ
    assert facts["data.tokens.shards"] == 2 and facts["tokenizer.hash"] == facts["data.tokens.tokenizer"]
    again, origins = facts_of(folder)
    assert changed_facts(facts, again) == [] and origins[SHARD] == REMEMBERED


@pytest.mark.parametrize("keep_times", [False, True])
def test_one_changed_byte_is_found_also_behind_the_times_of_before(folder: Path, keep_times: bool) -> None:
    before, _ = facts_of(folder)
    change_byte(folder / "train_00000.bin", keep_times=keep_times)
    after, origins = facts_of(folder)
    assert changed_facts(before, after) == [SHARD, "data.tokens.contents"] and origins[SHARD] == READ


def test_a_copy_elsewhere_is_the_same_data(folder: Path, tmp_path: Path) -> None:
    before, _ = facts_of(folder)
    shutil.copytree(folder, tmp_path / "elsewhere")
    after, origins = facts_of(tmp_path / "elsewhere")
    assert changed_facts(before, after) == [] and origins[SHARD] == READ


def test_without_time_to_read_a_file_counts_as_prepared_and_says_so(folder: Path) -> None:
    known, _ = facts_of(folder)
    (folder / KNOWN).unlink()
    facts, origins = facts_of(folder, seconds=0)
    assert changed_facts(known, facts) == [] and origins[SHARD] == origins["data.tokens.contents"] == PREPARED
    facts_of(folder)  # read, and remembered
    change_byte(folder / "train_00000.bin")
    facts, origins = facts_of(folder, seconds=0)
    assert changed_facts(known, facts) == [SHARD, "data.tokens.contents"] and facts[SHARD] == origins[SHARD] == WRITTEN


def test_suspect_files_are_read_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts_of(folder)
    order = []
    monkeypatch.setattr(data_content, "_digests", lambda folder, names, seconds: order.extend(names) or {})
    since = (folder / "dataset.json").stat().st_mtime_ns
    (folder / KNOWN).unlink()
    for number, name in enumerate(("train_00000.bin", "validation_00000.bin")):
        os.utime(folder / name, ns=(since, since + 10**9 * (2 * number - 1)))  # before, and after the folder was prepared
    facts_of(folder)
    assert order == ["validation_00000.bin", "train_00000.bin"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda folder: (folder / "tokenizer/tokenizer.json").write_text('{"model": {"vocab": {"a": 1}}}'), ["tokenizer.hash"]),
        (lambda folder: (folder / "train_00000.bin").unlink(), [SHARD, "data.tokens.contents"]),
        (lambda folder: (folder / "tokenizer/tokenizer.json").unlink(), ["tokenizer.hash"]),
        (
            lambda folder: (folder / "dataset.json").write_text((folder / "dataset.json").read_text() + " "),
            ["data.tokens.hash"],
        ),
    ],
    ids=["tokenizer", "shard removed", "tokenizer removed", "manifest"],
)
def test_single_changes(folder: Path, change, expected: list[str]) -> None:
    before, _ = facts_of(folder)
    change(folder)
    assert changed_facts(before, facts_of(folder)[0]) == expected


def test_what_cannot_be_remembered_beside_the_data_is_in_the_run(folder: Path, tmp_path: Path) -> None:
    (folder / KNOWN).mkdir()  # nothing can be written under this name
    (tmp_path / "run").mkdir()
    before, origins = facts_of(folder, spare=tmp_path / "run")
    assert origins[SHARD] == READ and len(list((tmp_path / "run").iterdir())) == 1
    after, origins = facts_of(folder, spare=tmp_path / "run")
    assert changed_facts(before, after) == [] and origins[SHARD] == REMEMBERED


def test_damaged_memory_is_read_again_and_no_folder_is_a_fact(folder: Path, tmp_path: Path) -> None:
    before, _ = facts_of(folder)
    for damage in ("{", "[]", '{"train_00000.bin": 3}', '{"train_00000.bin": {"stamp": 1, "hash": 2}}'):
        (folder / KNOWN).write_text(damage)
        assert changed_facts(before, facts_of(folder)[0]) == []
    facts, _ = data_facts({"tokens": tmp_path / "none"}, tmp_path / "none")
    assert facts["data.tokens.hash"] is None and "dataset.json" in facts["data.tokens.problem"]


def test_folders_are_named_by_their_last_part() -> None:
    assert folder_names(["/a/web", "/b/code", "/c/web", "rel/books/"]) == {
        "web": "/a/web",
        "code": "/b/code",
        "web~2": "/c/web",
        "books": "rel/books/",
    }
