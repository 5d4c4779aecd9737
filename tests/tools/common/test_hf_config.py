"""No call of transformers runs the code of a folder."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted(path for folder in ("recipes", "tools", "launch") for path in (ROOT / folder).rglob("*.py"))
LOADERS = ("from_pretrained", "from_config")


def auto_calls(path: Path) -> list[ast.Call]:
    """Return the calls of AutoConfig, AutoTokenizer, AutoModel... that may load a folder's code."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [
        call
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and call.func.attr in LOADERS
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id.startswith("Auto")
    ]


def test_every_auto_class_is_told_not_to_trust_remote_code():
    found = [(path, call) for path in FILES for call in auto_calls(path)]
    assert len(found) >= 8
    for path, call in found:
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        value = given.get("trust_remote_code")
        assert isinstance(value, ast.Constant) and value.value is False, f"{path}:{call.lineno}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_else_trusts_code(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "weights_only"):
            own = node.arg == "weights_only" and path.name == "forked_ranks.py"  # it loads what its own child wrote
            assert own or (isinstance(node.value, ast.Constant) and node.value.value is (node.arg == "weights_only"))
        if isinstance(node, ast.Attribute) and node.attr in LOADERS and isinstance(node.value, ast.Name):
            assert node.value.id.startswith("Auto"), f"{path}:{node.lineno}: by an Auto class, whose calls are judged above"
