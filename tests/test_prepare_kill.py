"""`kill -9` of a preparation, again and again: it goes on, and ends with the same bytes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tools.prepare_data import main

ROOT = Path(__file__).resolve().parents[1]
SYLLABLES = ["ta", "ri", "fol", "dem", "os", "kra", "ne", "ul"]


def folder_bytes(out):
    return {path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def random_text(rng):
    return " ".join("".join(SYLLABLES[i] for i in word) for word in rng.integers(0, 8, (1000, 3)))


class Forked:
    """The command in a forked process: no start-up, so a kill falls into the work."""

    def __init__(self, arguments):
        arguments = [*arguments, "--workers", "1"]
        self.pid = os.fork()
        if self.pid == 0:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # no threads of the parent's tokenizers are here
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            os._exit(main(arguments))

    def wait(self, timeout):
        """Whether it ended by itself, and well, within `timeout` seconds; it is killed if not."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if os.waitpid(self.pid, os.WNOHANG)[0]:
                return True
            time.sleep(0.001)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return False


class Spawned:
    """The command as users run it, with two worker processes. The kill hits the command alone."""

    def __init__(self, arguments):
        command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), *arguments, "--workers", "2"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def wait(self, timeout):
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return False
        return True


@pytest.mark.parametrize("start, kills", [(Forked, 20), (Spawned, 3)])
def test_kill_9_at_random_moments_ends_with_the_same_bytes(tmp_path, start, kills):
    rng = np.random.default_rng(7)
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"text": random_text(rng)}) + "\n" for _ in range(500)))
    out = tmp_path / "data"
    arguments = [str(path), "--out", str(out), "--dedup", "--train-tokenizer", "400", "--encoder", "tokenizers"]
    started = time.monotonic()
    assert start(arguments).wait(timeout=300)
    seconds = time.monotonic() - started
    whole = folder_bytes(out)
    shutil.rmtree(out)
    killed = 0
    for _ in range(10 * kills):
        killed += not start(arguments).wait(timeout=seconds * rng.uniform(0.1, 0.9))
        if (out / "manifest.json").exists():
            assert {name: raw for name, raw in folder_bytes(out).items() if "unfinished" not in name.parts} == whole
            shutil.rmtree(out)
        if killed == kills:
            break
    assert killed == kills
    assert start(arguments).wait(timeout=300)
    assert folder_bytes(out) == whole
