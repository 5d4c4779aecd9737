"""Carries a program's words past shells. DeepSpeed hands a command to pdsh, and pdsh to each host's shell, which obeys `$()`,
quotes and blanks: so they get one word of letters and digits, and on each host this script runs what it holds.

    deepspeed --hostfile HOSTS tools/supervise/packed_words.py PACKED         # on each host: --local_rank=N PACKED
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence

SAFE = re.compile(r"[A-Za-z0-9_@+=:,./-]*")  # what every shell, and pdsh, leaves as it is
# DeepSpeed exports all variables that begin so, between double quotes or as they are
EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL", "LD_LIBRARY", "PATH")


def pack(folder: str, words: Sequence[str]) -> str:
    """Return one word that holds a program's words and the folder to run it in."""
    return base64.urlsafe_b64encode(json.dumps([folder, *words]).encode()).decode()


def unpack(packed: str) -> tuple[str, list[str]]:
    folder, *words = json.loads(base64.urlsafe_b64decode(packed))
    return folder, words


def in_double_quotes(value: str) -> str:
    """Return what a shell reads as `value` between double quotes, where pdsh has replaced its own %h, %n and %u before."""
    return re.sub(r'([\\$`"])', r"\\\1", value).replace("%", "%%")


def unsafe_for_deepspeed(environment: Mapping[str, str], paths: Sequence[str]) -> list[str]:
    """Return a message for each path and variable that DeepSpeed puts before other hosts' shells, which would change it."""
    found = [
        f"{path}: a path with characters that the shells of other hosts would obey; use one of letters, digits and _@+=:,./-"
        for path in paths
        if not SAFE.fullmatch(path)
    ]
    return found + [
        f'{name}={value!r}: DeepSpeed exports it through the shells of other hosts, which would obey its $, `, ", \\ or %'
        for name, value in sorted(environment.items())
        if name.startswith(EXPORTED) and re.search(r'[$`"\\%\n]', value)
    ]


def main() -> None:
    *launchers, packed = sys.argv[1:]
    folder, (program, *words) = unpack(packed)
    os.chdir(folder)
    os.execv(sys.executable, [sys.executable, "-u", program, *launchers, *words])


if __name__ == "__main__":
    main()
