"""Folders of releases: made by pip from wheels that the test writes, without a network."""

import subprocess
import sys
import zipfile

import pytest

from tools.common.console import UsageError
from tools.replay.versions import parse_versions, release_environment, release_folder


def write_wheel(folder, version, code):
    """Write a release of xxhash, an installed package, that is `code` alone."""
    name = f"xxhash-{version}"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("xxhash/__init__.py", code)
        wheel.writestr(f"{name}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: xxhash\nVersion: {version}\n")
        wheel.writestr(
            f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{name}.dist-info/RECORD", "")


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    folder = tmp_path / "wheels"
    folder.mkdir()
    write_wheel(folder, "99.1", "VALUE = 991")
    write_wheel(folder, "99.2", "raise ImportError('needs another torch')")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def test_a_release_comes_first_on_the_path_and_is_made_once(wheels, tmp_path, capsys):
    made = release_folder("xxhash", "99.1", within=tmp_path / "cache")
    code = "import xxhash, importlib.metadata as m, numpy; print(xxhash.VALUE, m.version('xxhash'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=release_environment([made]), capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["991", "99.1"]
    (wheels / "xxhash-99.1-py3-none-any.whl").unlink()
    assert release_folder("xxhash", "99.1", within=tmp_path / "cache") == made
    assert capsys.readouterr().err.count("installing") == 1


def test_a_release_that_is_not_there_or_does_not_fit_is_told_and_leaves_nothing(wheels, tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(UsageError, match=r"xxhash=98.0: pip cannot install it here: .*xxhash==98.0"):
        release_folder("xxhash", "98.0", within=cache)
    with pytest.raises(UsageError, match="cannot be imported beside the other packages here: ImportError: needs another torch"):
        release_folder("xxhash", "99.2", within=cache)
    assert list(cache.iterdir()) == []


def test_several_releases_are_read_and_typed():
    assert parse_versions(["deepspeed=0.19.2,numpy==2.0"]) == {"deepspeed": "0.19.2", "numpy": "2.0"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["deepspeed"], "expected PACKAGE=VERSION"),
        (["deepspeed=new"], "'new' is no version"),
        (["deepspeed=0.19.2", "DeepSpeed=0.19.3"], "given twice"),
        (["no-such-package=1.0"], "is not installed here"),
    ],
)
def test_words_that_name_no_release(words, told):
    with pytest.raises(UsageError, match=told):
        parse_versions(words)
