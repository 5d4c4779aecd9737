"""Says which packages are installed, to the last file: another wheel of the same version, and files edited in place, are seen.

A package's files are known by the hashes in its RECORD, which the installer wrote: reading some megabytes says it all. That the
files are still those is checked for the packages that compute, of the modules that this process has loaded: what runs.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

# packages whose code computes: their loaded modules are compared with what was installed
COMPUTE = ("torch", "deepspeed", "transformers", "tokenizers", "safetensors", "numpy", "triton", "flash-attn", "accelerate")
MAIN = ("torch", "deepspeed", "transformers", "tokenizers", "sentencepiece", "datasets", "safetensors", "numpy")
_INFO = re.compile(r"([^-]+)-([^-]+)(?:-[^-]+)*\.(?:dist|egg)-info")
_KEPT = (b"METADATA", b"WHEEL", b"entry_points.txt")  # of a wheel's own description; the rest says how it was installed


def package_versions(packages: Sequence[str] = MAIN) -> dict[str, str | None]:
    """Return installed versions, null where a package is missing."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def package_facts(path: Sequence[str] | None = None) -> dict[str, Any]:
    """Return "package.NAME.version", "package.NAME.files" (null where the installer left no list), and "package.NAME.edited".

    The last, of a package whose loaded files are not those that were installed, is {file: hash}. path: folders to look in, in
    the order of imports.
    """
    facts, loaded = {}, _loaded_files()
    for name, info in sorted(_installed(sys.path if path is None else path).items()):
        version = _INFO.fullmatch(info.name)[2]
        entries = wheel_entries(_record(info))
        facts[f"package.{name}.version"] = version
        facts[f"package.{name}.files"] = files_hash(entries) if entries else _editable_hash(info)
        if name in COMPUTE and (edited := edited_files(entries, info.parent, loaded)):
            facts[f"package.{name}.edited"] = edited
    return facts


def files_hash(entries: Sequence[tuple[bytes, bytes]]) -> str:
    """Hash a wheel's files: the same wheel, the same hash."""
    return "sha256:" + hashlib.sha256(b"\n".join(sorted(b"%s,%s" % entry for entry in entries))).hexdigest()


def edited_files(entries: Sequence[tuple[bytes, bytes]], site: Path, loaded: Sequence[str]) -> dict[str, str]:
    """Return {file: its hash} of those `loaded` files of a package, installed under `site`, that are not as its RECORD says."""
    listed = {path.decode(errors="replace"): digest.decode() for path, digest in entries if path.endswith(b".py")}
    edited, inside = {}, f"{site}/"
    for path in loaded:
        file = path.removeprefix(inside)
        if file != path and (expected := listed.get(file)) is not None:
            try:
                digest = hashlib.sha256((site / file).read_bytes()).digest()
            except OSError:
                continue
            if expected != "sha256=" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode():
                edited[file] = f"sha256:{digest.hex()}"
    return edited


def _installed(path: Sequence[str]) -> dict[str, Path]:
    """Return canonical name -> folder that describes the package; as for imports, the first on the path counts."""
    found: dict[str, Path] = {}
    for folder in dict.fromkeys(path):
        here = Path(folder or ".")
        if here.is_dir():
            for info in sorted(here.glob("*-info")):
                if match := _INFO.fullmatch(info.name):
                    found.setdefault(re.sub(r"[-_.]+", "-", match[1]).lower(), info)
    return found


def _record(info: Path) -> bytes:
    try:
        return (info / "RECORD").read_bytes()
    except OSError:  # a system's package, or an old one
        return b""


def wheel_entries(record: bytes) -> list[tuple[bytes, bytes]]:
    """Return (file, hash) of the files of a RECORD that come from the wheel, whoever installed it, wherever."""
    entries = []
    for line in record.splitlines():
        path, _, digest = line.rpartition(b",")[0].rpartition(b",")  # PATH,sha256=HASH,SIZE; a path may hold commas
        path = path.strip(b'"')
        if not digest or path.startswith((b"..", b"/")):  # compiled later; programs, which name this machine's Python
            continue
        folder, _, name = path.rpartition(b"/")
        if not folder.endswith(b".dist-info") or name in _KEPT:
            entries.append((path, digest))
    return entries


def _loaded_files() -> list[str]:
    files = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    return sorted({file for file in files if isinstance(file, str)})


def _editable_hash(info: Path) -> str | None:
    """Return the hash of the sources of a package that is installed as a link to them; None for any other."""
    try:
        origin = json.loads((info / "direct_url.json").read_bytes())
        root = Path(origin["url"].removeprefix("file://")) if origin["dir_info"]["editable"] else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return None if root is None else sources_hash(root)


def sources_hash(root: Path, pattern: str = "*.py") -> str:
    """Hash the Python files under a folder: their paths from it, and their contents."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob(pattern)):
        if path.is_file():
            digest.update(f"{path.relative_to(root)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return "sha256:" + digest.hexdigest()
