"""Gives a CPU build of torch a CUDA device that does nothing: compiles fake_cuda.cpp once, and loads it before torch.

Autograd asks for the device of every tensor it meets, and aborts the process where torch has no CUDA in it. The shared object is
kept in the user's cache, by the source, the compiler and torch's version. Importing this module imports no torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("fake_cuda.cpp")
COMPILER = "g++"


class ShimError(RuntimeError):
    """The stand-in for CUDA cannot be built here; the message says why and what helps."""


def load_shim() -> str:
    """Load the stand-in where torch's build needs one. Call it before anything imports torch. Returns what stands for CUDA."""
    version = _version()
    if not needed():
        return f"torch {version['__version__']}'s own CUDA, without a GPU"
    assert "torch" not in sys.modules, "torch asks for its devices as it is imported: the stand-in must be there before"
    library = _compiled(_torch_folder(), version["__version__"])
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return f"a device guard of {SOURCE.name} in torch {version['__version__']}, a build without CUDA"


def missing() -> str | None:
    """Return what the stand-in lacks on this machine, if anything."""
    return f"no {COMPILER}, and torch is a build without CUDA" if needed() and shutil.which(COMPILER) is None else None


def needed() -> bool:
    """Return whether torch is a build without CUDA."""
    return not _version().get("cuda")


def _torch_folder() -> Path:
    return Path(importlib.util.find_spec("torch").submodule_search_locations[0])


def _version() -> dict[str, Any]:
    return runpy.run_path(str(_torch_folder() / "version.py"))


def _compiled(torch_folder: Path, torch_version: str) -> Path:
    """Return the shared object, compiled now unless the cache has it."""
    text = SOURCE.read_bytes()
    key = hashlib.sha256(text + f"{torch_folder} {torch_version}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trifold"
    library = cache / f"fake_cuda_{key}.so"
    if library.exists():
        return library
    if shutil.which(COMPILER) is None:
        raise ShimError(f"{missing()}: install {COMPILER}, or a CUDA build of torch, which needs no GPU for this")
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ShimError(f"{cache}: {error.strerror}; set XDG_CACHE_HOME to a folder that can be written") from error
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        built = Path(scratch) / library.name
        libraries = torch_folder / "lib"
        command = [COMPILER, "-shared", "-fPIC", "-std=c++20", f"-I{torch_folder / 'include'}", str(SOURCE), "-o", str(built)]
        command += [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lc10", "-ltorch_cpu"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ShimError(f"{' '.join(command)}: failed\n{done.stderr[-2000:]}")
        built.replace(library)  # another process may have built it too
    return library
