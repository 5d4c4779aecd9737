"""Every verb of every tool explains itself, and loads no more than it needs."""

import contextlib
import importlib
import io
import os
import subprocess
import sys

import pytest

from tests.support.tiny import ROOT
from tools.common.forked_ranks import run_ranks

TOOLS = ("changed", "checkpoint", "data", "plan", "spikes", "throughput")


@pytest.mark.parametrize("tool", TOOLS)
def test_every_verb_has_help(tool):
    helps = run_ranks(_helps, 1, tool)[0]
    assert helps and all(text.startswith(f"usage: python -m tools.{tool} {verb}") for verb, text in helps.items())
    for verb, text in helps.items():
        assert "--json" in text and len(text.split("\n\n")[1]) > 20, verb


def _helps(tool):
    module = importlib.import_module(f"tools.{tool}.__main__")
    return {verb: _help(module.main, verb) for verb in module.VERBS}


def _help(main, verb):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([verb, "--help"])
    return text.getvalue()


@pytest.mark.parametrize("words", [["spikes", "scan", "a.csv"], ["checkpoint", "ls", "."], ["data", "check", "."]])
def test_a_verb_that_only_reads_loads_no_torch(words, tmp_path):
    """From any folder, by the tool's path, and by its own folder."""
    rows = "".join(f"{step},{2 + step % 3 / 100}\n" for step in range(1, 200))
    (tmp_path / "a.csv").write_text("step,loss\n" + rows)
    (tmp_path / "checkpoints").mkdir()
    program = (
        f"import runpy, sys; sys.argv = {words!r}\n"
        f"try: runpy.run_path({str(ROOT / 'tools' / words[0])!r}, run_name='__main__')\n"
        "except SystemExit as leaving: print(leaving.code)\n"
        "print(sorted({'torch', 'transformers', 'deepspeed'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    code, loaded = done.stdout.splitlines()[-2:]
    assert code == ("2" if words[0] == "data" else "0"), done.stderr
    assert loaded == "[]"


def test_an_unknown_verb_is_the_users_mistake(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "tools" / "data", "lst"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "invalid choice: 'lst'" in done.stderr and not done.stdout


HELPS = """
import os, runpy, sys
import transformers.modeling_utils  # once; each tool imports DeepSpeed itself
assert "deepspeed" not in sys.modules
for number, words in enumerate([["verify"], ["throughput", "schedules"]]):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(str(number), os.O_CREAT | os.O_WRONLY), 1)
        sys.argv = [words[0], *words[1:], "--help"]
        runpy.run_module(f"tools.{words[0]}", run_name="__main__", alter_sys=True)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_what_deepspeed_logs_stays_off_stdout(tmp_path):
    """It warns, on what is stdout while it is imported, that it found no accelerator: --json would not be JSON."""
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", HELPS], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("accelerator") >= 2
    for number, tool in enumerate(("verify", "throughput schedules")):
        assert (tmp_path / str(number)).read_text().startswith(f"usage: python -m tools.{tool} ")
