"""A JSON file is whole or absent, and has no key twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.common.config.json_files import JsonError, read_json, unique_keys, write_json


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_key_given_twice_is_refused() -> None:
    assert json.loads('{"a": {"b": 1}, "c": 2}', object_pairs_hook=unique_keys) == {"a": {"b": 1}, "c": 2}
    with pytest.raises(ValueError, match=r"key given twice: \['b'\]"):
        json.loads('{"a": {"b": 1, "c": 2, "b": 3}}', object_pairs_hook=unique_keys)


@pytest.mark.parametrize(
    "raw, problem",
    [
        (b"", r"no JSON \(it is empty\)"),
        (b'{"a": 1', "no JSON: Expecting"),
        (b"[" * 100_000, "no JSON: nested too deeply"),
        (b'{"a":' * 100_000, "no JSON: nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "no JSON: Exceeds the limit"),
        (b'{"a": "\xff"}', "not UTF-8 at its byte 7"),
        (b"[]", "holds list where an object belongs"),
        (b"null", "holds NoneType where an object belongs"),
        (b'{"a": 1, "a": 2}', r"no JSON: key given twice: \['a'\]"),
    ],
)
def test_what_is_not_the_json_that_belongs_there_is_one_message_with_the_files_name(tmp_path, raw, problem):
    path = tmp_path / "a.json"
    path.write_bytes(raw)
    with pytest.raises(JsonError, match=f"a.json: {problem}"):
        read_json(path, unique=True)


def test_a_byte_order_mark_is_no_part_of_the_json(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": [1]}')
    assert read_json(tmp_path / "a.json") == {"a": [1]}
    with pytest.raises(JsonError, match="holds dict where a list belongs"):
        read_json(tmp_path / "a.json", list)
