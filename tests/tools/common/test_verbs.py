"""Every verb of every tool explains itself, and loads no more than it needs."""

import contextlib
import importlib
import io
import logging
import os
import runpy
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


def _first_help(words):
    """Return what `--help` prints on stdout and on stderr where nothing has imported DeepSpeed."""
    os.environ.pop("DS_ACCELERATOR", None)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("deepspeed", "recipes", "tools")]:
        del sys.modules[name]
    logging.getLogger("DeepSpeed").handlers.clear()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
        sys.argv = [words[0], *words[1:], "--help"]
        runpy.run_module(f"tools.{words[0]}", run_name="__main__", alter_sys=True)
    return out.getvalue(), err.getvalue()


@pytest.mark.parametrize("words", [["verify"], ["throughput", "schedules"]], ids=" ".join)
def test_what_deepspeed_logs_stays_off_stdout(words):
    """It warns, on what is stdout while it is imported, that it found no accelerator: --json would not be JSON."""
    out, err = run_ranks(_first_help, 1, words)[0]
    assert "accelerator" in err
    assert out.startswith(f"usage: python -m tools.{' '.join(words)} ")
