"""Keeps folders that hold one release of one package each, to be put first on a process's path: `--versions deepspeed=0.19.2`.

A folder is made once, by pip, without the release's dependencies: everything else stays as it is installed here. It gets its name
when it is whole and its package can be imported beside the others, so what a kill left is never used. Making one may use the
network; using one does not.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from tools.common.console import UsageError

INSTALL_SECONDS, IMPORT_SECONDS = 1800.0, 600.0
_SHOWN = 300  # characters of what another program said


def parse_versions(words: Sequence[str]) -> dict[str, str]:
    """Return package -> version of words such as "deepspeed=0.19.2" or "deepspeed=0.19.2,transformers=5.22.0".

    Raises UsageError for another form, a package that is not installed here, and one that is given twice.
    """
    found: dict[str, str] = {}
    for item in (item for word in words for item in word.split(",")):
        package, equals, version = item.partition("=")
        package, version = canonicalize_name(package.strip()), version.removeprefix("=").strip()
        if not equals or not package:
            raise UsageError(f"--versions {item}: expected PACKAGE=VERSION, such as deepspeed=0.19.2")
        try:
            version = str(Version(version))
        except InvalidVersion:
            raise UsageError(f"--versions {item}: {version!r} is no version; write one like 0.19.2") from None
        if package in found:
            raise UsageError(f"--versions {item}: {package} is given twice; one release of it can be first on the path")
        _modules(package)
        found[package] = version
    return found


def releases_folder() -> Path:
    """Return the folder under which this user's releases are kept, for this Python."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    python = f"python{sys.version_info.major}.{sys.version_info.minor}-{sysconfig.get_platform()}"
    return Path(cache).expanduser() / "trifold" / "releases" / python


def release_folder(package: str, version: str, *, within: Path | None = None) -> Path:
    """Return the folder of a release, to be put first on PYTHONPATH (`release_environment`); make it where it is not there.

    within: where folders are kept, in place of `releases_folder`. Raises UsageError where there is no such release, it cannot be
    built here, or it cannot be imported beside the other packages that are installed; nothing is left behind then.
    """
    package, within = canonicalize_name(package), within or releases_folder()
    folder = within / f"{package}-{version}"
    if folder.is_dir():
        return folder
    modules = _modules(package)
    within.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=f".{package}-{version}.", dir=within))
    try:
        print(f"installing {package} {version} into {folder}", file=sys.stderr, flush=True)
        _install(package, version, making)
        _check_import(package, version, modules, making)
        with contextlib.suppress(OSError):  # another process was faster: its folder holds the same
            os.rename(making, folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    if not folder.is_dir():
        raise UsageError(f"--versions {package}={version}: {folder} cannot be made; name another cache with XDG_CACHE_HOME")
    return folder


def release_environment(folders: Sequence[Path], environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment (of this process, or the given one) with these folders first on Python's path."""
    before = dict(os.environ if environment is None else environment)
    path = [*map(str, folders), *filter(None, [before.get("PYTHONPATH")])]
    return before | {"PYTHONPATH": os.pathsep.join(path)}


def _modules(package: str) -> list[str]:
    """Return the names by which an installed package is imported. Raises UsageError for one that is not installed."""
    names = importlib.metadata.packages_distributions()
    modules = sorted(name for name, owners in names.items() if package in map(canonicalize_name, owners))
    modules = [name for name in modules if name.isidentifier() and not name.startswith("_")]
    if not modules:
        raise UsageError(f"--versions: {package} is not installed here, so nothing runs with it; name an installed package")
    return modules


def _install(package: str, version: str, target: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-input", "--disable-pip-version-check"]
    if importlib.util.find_spec("setuptools") and importlib.util.find_spec("wheel"):
        command.append("--no-build-isolation")  # a source release is built with what is here: half the time, and less network
    command += ["--target", str(target), f"{package}=={version}"]
    quiet = os.environ | {"DS_BUILD_OPS": "0"}  # DeepSpeed compiles nothing that training uses here
    done = _run(command, quiet, INSTALL_SECONDS, f"--versions {package}={version}: pip")
    if done.returncode:
        raise UsageError(f"--versions {package}={version}: pip cannot install it here: {_reason(done.stderr or done.stdout)}")


def _check_import(package: str, version: str, modules: Sequence[str], folder: Path) -> None:
    code = (
        f"import importlib, importlib.metadata as m\nfor name in {[*modules]!r}: importlib.import_module(name)\n"
        f"assert m.version({package!r}) == {version!r}, 'the installed one comes first: ' + m.version({package!r})"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    with tempfile.TemporaryDirectory() as elsewhere:  # -c puts the working folder first on the path
        what = f"--versions {package}={version}: its import"
        done = _run(command, release_environment([folder]), IMPORT_SECONDS, what, elsewhere)
    if done.returncode:
        raise UsageError(
            f"--versions {package}={version}: it cannot be imported beside the other packages here: {_reason(done.stderr)}"
        )


def _run(
    command: list[str], environment: Mapping[str, str], seconds: float, what: str, folder: str | None = None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, env=dict(environment), cwd=folder, capture_output=True, text=True, errors="replace", timeout=seconds
        )
    except subprocess.TimeoutExpired:
        raise UsageError(f"{what} did not end in {seconds:.0f} s; try again, or install the release by hand") from None


def _reason(text: str) -> str:
    """Return the last line that says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR", "error")) or "Error" in line]
    return (errors or lines or ["no word of it"])[-1].removeprefix("ERROR: ")[:_SHOWN]
