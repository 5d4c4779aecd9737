"""Installed packages are known to the last file: another wheel, an edited module, an editable source; not who installed them."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from recipes.common.record.packages import package_facts
from recipes.common.run_dir.segments import changed_facts

MODULES = {"accelerate/__init__.py": b"VERSION = 1\n", "accelerate/sums.py": b"def add(a, b):\n    return a + b\n"}


def install(site: Path, files: dict[str, bytes] = MODULES, version: str = "1.0", extra: str = "") -> Path:
    """Install a package as pip does, with a program and a compiled file in RECORD. extra: more lines of RECORD."""
    info = site / f"accelerate-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["../../../bin/accelerate,sha256=AAAA,111", "accelerate/__pycache__/sums.pyc,,", f"{info.name}/RECORD,,"]
    for name, content in (files | {f"{info.name}/METADATA": b"Name: accelerate\n"}).items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_bytes(content)
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(content)}")
    (info / "RECORD").write_text("\n".join(lines) + "\n" + extra)
    return site


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch):
    """Return a function that declares the modules of a folder loaded."""

    def load(site: Path) -> Path:
        for name in MODULES:
            module = ModuleType(name)
            module.__file__ = str(site / name)
            monkeypatch.setitem(sys.modules, name, module)
        return site

    return load


def changed(before: Path, after: Path) -> list[str]:
    return changed_facts(*(package_facts([str(site)]) for site in (before, after)))


def test_the_same_wheel_is_the_same_wherever_and_by_whom_it_was_installed(tmp_path: Path, loaded) -> None:
    install(tmp_path / "a")
    install(
        tmp_path / "b",
        extra="accelerate-1.0.dist-info/INSTALLER,sha256=BBBB,2\naccelerate-1.0.dist-info/uv_cache.json,sha256=C,3\n",
    )
    (tmp_path / "b/accelerate-1.0.dist-info/RECORD").write_text(
        (tmp_path / "b/accelerate-1.0.dist-info/RECORD").read_text().replace("sha256=AAAA,111", "sha256=ZZZZ,222")
    )
    loaded(tmp_path / "a"), loaded(tmp_path / "b")
    assert changed(tmp_path / "a", tmp_path / "b") == []
    assert package_facts([str(tmp_path / "a")]).keys() == {"package.accelerate.version", "package.accelerate.files"}


def test_another_wheel_of_the_same_version_is_seen(tmp_path: Path) -> None:
    install(tmp_path / "a")
    install(tmp_path / "b", MODULES | {"accelerate/sums.py": b"def add(a, b):\n    return b + a\n"})
    install(tmp_path / "c", version="1.1")
    assert changed(tmp_path / "a", tmp_path / "b") == ["package.accelerate.files"]
    assert changed(tmp_path / "a", tmp_path / "c") == ["package.accelerate.version", "package.accelerate.files"]
    assert (
        package_facts([str(tmp_path / "c"), str(tmp_path / "a")])["package.accelerate.version"] == "1.1"
    )  # the first is imported


def test_a_file_edited_in_place_is_seen_once_it_is_loaded(tmp_path: Path, loaded) -> None:
    site = install(tmp_path / "a")
    before = package_facts([str(site)])
    (site / "accelerate/sums.py").write_bytes(b"def add(a, b):\n    return a - b\n")
    assert changed_facts(before, package_facts([str(site)])) == []
    loaded(site)
    after = package_facts([str(site)])
    assert changed_facts(before, after) == ["package.accelerate.edited"]
    assert list(after["package.accelerate.edited"]) == ["accelerate/sums.py"]


def test_an_editable_package_is_known_by_its_sources(tmp_path: Path) -> None:
    info, source = tmp_path / "site/accelerate-1.0.dist-info", tmp_path / "checkout"
    info.mkdir(parents=True)
    source.mkdir()
    (source / "sums.py").write_text("one")
    (info / "direct_url.json").write_text(json.dumps({"url": f"file://{source}", "dir_info": {"editable": True}}))
    before = package_facts([str(tmp_path / "site")])
    (source / "sums.py").write_text("two")
    assert changed_facts(before, package_facts([str(tmp_path / "site")])) == ["package.accelerate.files"]


def test_every_package_here_is_found() -> None:
    facts = package_facts()
    for name in ("torch", "deepspeed", "transformers", "numpy"):
        assert facts[f"package.{name}.version"] == package_versions([name])[name]
        assert facts[f"package.{name}.files"].startswith("sha256:")
    assert len(facts) > 100 and facts == package_facts()


def package_versions(names: list[str]) -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in names}
