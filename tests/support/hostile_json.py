"""Makes JSON files that no reader should meet: broken ones, and whole ones with values of other kinds in random places."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

DEEP = 100_000
BROKEN = (
    b"",
    b"   ",
    b"nul",
    b"[",
    b'{"a": 1',
    b'{"a": 1}}',
    b"{'a': 1}",
    b"[" * DEEP,
    b'{"a":' * DEEP,
    b'{"a": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    b'{"a": ' + b"9" * 5000 + b"}",
    b'{"a": "\xff"}',
    "{}".encode("utf-16"),
    b"\0" * 64,
    b"version https://git-lfs.github.com/spec/v1\n",
)
OTHER_KINDS = (b"null", b"5", b"NaN", b'"text"', b"[]", b"[[[]]]", b"{}", b"true")
VALUES: tuple[Any, ...] = (None, True, -1, 10**9, 10**30, 1e308, float("nan"), "", "x", "../../x", "/etc/passwd", "a\0b", [], {})
VALUES += ([[]], [1, 2], {"a": {}}, "\x1b[31m", "<!--<script", "\ud800")


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*path, key)
        yield from _places(item, (*path, key))


def variants(content: Any, count: int, seed: int = 0) -> Iterator[bytes]:
    """Yield broken files, files of other kinds, and `count` copies of `content` with one or two values changed or gone."""
    yield from (*BROKEN, *OTHER_KINDS)
    rng = random.Random(seed)
    for _ in range(count):
        changed = copy.deepcopy(content)
        for _ in range(rng.choice((1, 1, 2))):
            *path, key = rng.choice([*_places(changed)] or [("a",)])
            parent = changed
            for step in path:
                parent = parent[step]
            if rng.random() < 0.2:
                del parent[key]
            else:
                parent[key] = rng.choice(VALUES)
        yield json.dumps(changed).encode()


def one_message(error: Exception) -> str:
    """Return the message, which must be one, short, and without a traceback."""
    said = str(error)
    assert said and len(said) < 2000 and "Traceback" not in said, said[:500]
    return said
