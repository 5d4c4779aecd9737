"""`kill -9` of a preparation, again and again. A minute on two busy cores."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SYLLABLES = ["ta", "ri", "fol", "dem", "os", "kra", "ne", "ul"]


def folder_bytes(out):
    return {path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def random_text(rng):
    return " ".join("".join(SYLLABLES[i] for i in word) for word in rng.integers(0, 8, (3000, 3)))


def test_kill_9_at_20_moments_ends_with_the_same_bytes(tmp_path):
    """Kills of the command, spread over its run; each restart goes on, and nothing half-written counts as whole."""
    rng = np.random.default_rng(7)
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"text": random_text(rng)}) + "\n" for _ in range(200)))
    out = tmp_path / "data"
    command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), str(path), "--out", str(out), "--dedup"]
    command += ["--train-tokenizer", "400", "--workers"]
    started = time.monotonic()
    subprocess.run([*command, "2"], check=True, capture_output=True)
    seconds = time.monotonic() - started
    whole = folder_bytes(out)
    shutil.rmtree(out)
    kills = 0
    while kills < 20:
        workers = str(1 + kills % 2)
        process = subprocess.Popen([*command, workers], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=seconds * rng.uniform(0.2, 1.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        if (out / "manifest.json").exists():
            assert {name: raw for name, raw in folder_bytes(out).items() if "unfinished" not in name.parts} == whole
            shutil.rmtree(out)
    subprocess.run([*command, "1"], check=True, capture_output=True)
    assert folder_bytes(out) == whole
