"""A JSON file is whole or absent, and has no key twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.common.config.json_files import unique_keys, write_json


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
