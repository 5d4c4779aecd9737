"""The code that runs: its commit, the patch that makes it of the commit, and its hash."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from recipes.common.record.source_code import code_facts, git_state
from recipes.common.run_dir.segments import changed_facts, content_hash


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), "-c", "user.name=n", "-c", "user.email=e@x", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    (root / "recipes/common").mkdir(parents=True)
    (root / "recipes/common/loss.py").write_text("a = 1\n")
    (root / "README.md").write_text("text\n")
    git(tmp_path, "init", "-q", "checkout")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "m")
    return root


def test_a_clean_checkout(checkout: Path) -> None:
    facts, patch = code_facts(checkout)
    assert facts["git.commit"] == git(checkout, "rev-parse", "HEAD") and facts["git.patch"] == "" and patch is None
    assert code_facts(checkout) == (facts, patch)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("recipes/common/loss.py", ["git.patch", "code.hash"]),
        ("README.md", ["git.patch"]),
        ("recipes/mine.py", ["git.patch"]),  # not added yet
        ("recipes/common/new.py", ["git.patch", "code.hash"]),
        ("runs/log.txt", []),  # what a run writes is no code
    ],
)
def test_an_uncommitted_line_is_seen_and_the_patch_makes_it_again(
    checkout: Path, tmp_path: Path, file: str, expected: list
) -> None:
    git(tmp_path, "clone", "-q", "checkout", "clone")
    before, _ = code_facts(checkout)
    (checkout / file).parent.mkdir(exist_ok=True)
    (checkout / file).write_text("a = 1\nb = 2\n")
    after, patch = code_facts(checkout)
    assert changed_facts(before, after) == expected
    if expected:
        assert after["git.patch"] == content_hash(patch)
        (tmp_path / "patch").write_bytes(patch)
        git(tmp_path / "clone", "apply", str(tmp_path / "patch"))
        assert (tmp_path / "clone" / file).read_text() == "a = 1\nb = 2\n"
        assert changed_facts(after, code_facts(tmp_path / "clone")[0]) == []  # a user's settings of git change nothing


def test_a_commit_is_seen_and_a_long_patch_is_kept_by_its_hash(checkout: Path) -> None:
    before, _ = code_facts(checkout)
    (checkout / "README.md").write_text("x" * (5 << 20))
    facts, patch = code_facts(checkout)
    assert changed_facts(before, facts) == ["git.patch"] and facts["git.patch"] and patch is None
    git(checkout, "commit", "-aqm", "n")
    assert changed_facts(before, code_facts(checkout)[0]) == ["git.commit"]


def test_outside_a_checkout_the_code_is_still_known(tmp_path: Path) -> None:
    (tmp_path / "recipes/common").mkdir(parents=True)
    (tmp_path / "recipes/common/loss.py").write_text("a = 1\n")
    before, patch = code_facts(tmp_path)
    assert (before["git.commit"], before["git.patch"], patch) == (None, None, None)
    (tmp_path / "recipes/common/loss.py").write_text("a = 2\n")
    assert changed_facts(before, code_facts(tmp_path)[0]) == ["code.hash"]


def test_git_state(checkout: Path, tmp_path: Path) -> None:
    assert git_state(tmp_path) == {"commit": None, "dirty": None}
    assert git_state(checkout) == {"commit": git(checkout, "rev-parse", "HEAD"), "dirty": False}
    (checkout / "README.md").write_text("2")
    assert git_state(checkout)["dirty"] is True
