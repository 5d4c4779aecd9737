"""A preparation killed by `kill -9` again and again continues, and ends with the same bytes."""

import json
import multiprocessing
import shutil
import sys
import time

import numpy as np

from tools.data import inputs
from tools.data.__main__ import main

SYLLABLES = ["ta", "ri", "fol", "dem", "os", "kra", "ne", "ul"]


def folder_bytes(out):
    return {path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def random_text(rng):
    return " ".join("".join(SYLLABLES[i] for i in word) for word in rng.integers(0, 8, (1000, 3)))


def prepare(arguments):
    inputs.MIN_UNIT_BYTES = 1 << 18  # little text in several units
    sys.exit(main(["prepare", *arguments]))


def run(arguments, timeout):
    """Return whether the command ended within `timeout` seconds; if not, kill it alone, not its workers.

    It is forked from a process that has imported the tool and does nothing else: this one may hold threads of a tokenizer.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tools.data.prepare"])
    process = context.Process(target=prepare, args=(arguments,))
    process.start()
    process.join(timeout)
    ended = not process.is_alive()
    process.kill()
    process.join()
    assert process.exitcode == 0 or not ended
    return ended


def test_kill_9_at_20_random_moments_ends_with_the_same_bytes(tmp_path):
    rng = np.random.default_rng(7)
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"text": random_text(rng)}) + "\n" for _ in range(120)))
    out = tmp_path / "data"
    arguments = [str(path), "--out", str(out), "--dedup"]
    assert run([*arguments, "--train-tokenizer", "400"], timeout=120)
    shutil.copytree(out / "tokenizer", tmp_path / "tokenizer")
    shutil.rmtree(out)
    arguments += ["--tokenizer", str(tmp_path / "tokenizer"), "--workers"]
    seconds, wholes = {}, []
    for workers in (1, 2):
        started = time.monotonic()
        assert run([*arguments, str(workers)], timeout=120)
        seconds[workers] = time.monotonic() - started
        wholes.append(folder_bytes(out))
        shutil.rmtree(out)
    whole = wholes[0]
    assert whole == wholes[1] and sum(name.suffix == ".bin" for name in whole) > 4
    killed = 0
    for _ in range(100):
        workers = 2 if killed % 4 == 3 else 1
        killed += not run([*arguments, str(workers)], timeout=seconds[workers] * rng.uniform(0.1, 0.9))
        if (out / "dataset.json").exists():
            assert {name: raw for name, raw in folder_bytes(out).items() if "unfinished" not in name.parts} == whole
            shutil.rmtree(out)
        if killed == 20:
            break
    assert killed == 20
    assert run([*arguments, "1"], timeout=120)
    assert folder_bytes(out) == whole
