"""A preparation killed by `kill -9` again and again continues, and ends with the same bytes."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[3]
SYLLABLES = ["ta", "ri", "fol", "dem", "os", "kra", "ne", "ul"]


def folder_bytes(out):
    return {path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def random_text(rng):
    return " ".join("".join(SYLLABLES[i] for i in word) for word in rng.integers(0, 8, (1000, 3)))


def run(arguments, timeout):
    """Return whether the command ended within `timeout` seconds; if not, kill it alone, not its workers."""
    command = [sys.executable, str(ROOT / "tools" / "data"), "prepare", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    assert process.returncode == 0
    return True


def test_kill_9_at_20_random_moments_ends_with_the_same_bytes(tmp_path):
    rng = np.random.default_rng(7)
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"text": random_text(rng)}) + "\n" for _ in range(350)))
    out = tmp_path / "data"
    arguments = [str(path), "--out", str(out), "--dedup"]
    assert run([*arguments, "--train-tokenizer", "400"], timeout=120)
    shutil.copytree(out / "tokenizer", tmp_path / "tokenizer")
    shutil.rmtree(out)
    arguments += ["--tokenizer", str(tmp_path / "tokenizer"), "--workers"]
    started = time.monotonic()
    assert run([*arguments, "2"], timeout=120)
    seconds = time.monotonic() - started
    whole = folder_bytes(out)
    shutil.rmtree(out)
    killed = 0
    for _ in range(60):
        killed += not run([*arguments, str(1 + killed % 2)], timeout=seconds * rng.uniform(0.1, 0.9))
        if (out / "dataset.json").exists():
            assert {name: raw for name, raw in folder_bytes(out).items() if "unfinished" not in name.parts} == whole
            shutil.rmtree(out)
        if killed == 20:
            break
    assert killed == 20
    assert run([*arguments, "1"], timeout=120)
    assert folder_bytes(out) == whole
