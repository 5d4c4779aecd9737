"""The command and the environment that an attempt is started with."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from recipes.common.runtime.authenticated_link import SECRET, SECRET_FILE, read_secret
from recipes.common.runtime.supervisor_link import SUPERVISOR
from tools.common.console import UsageError
from tools.supervise.__main__ import _given_secret
from tools.supervise.hosts import read_hostfile
from tools.supervise.launcher import complete, fill_words, secret_file, write_exports


def test_the_launchers_words_are_filled_in(tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "29777")
    words = "deepspeed --hostfile {hostfile} {force_multi} --master_addr {master} --master_port {port} x={hosts}/{nodes}"
    two = fill_words(words, tmp_path, {"10.77.0.8": 2, "10.77.0.9": 2}, "10.77.0.8")
    assert two[3:] == ["--force_multi", "--master_addr", "10.77.0.8", "--master_port", "29777", "x=10.77.0.8,10.77.0.9/2"]
    assert read_hostfile(tmp_path / "hostfile") == {"10.77.0.8": 2, "10.77.0.9": 2}
    one = fill_words(words, tmp_path, {"localhost": 2}, None)
    assert one[3:5] == ["--master_addr", "127.0.0.1"]


def test_other_hosts_get_what_env_names_and_the_users_own_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\n\n# a remark\n")
    variables = {
        SUPERVISOR: "h:1",
        SECRET: "s",
        SECRET_FILE: "/f",
        "TRIFOLD_EXPORTS": "NCCL_DEBUG LINES",
        "NCCL_DEBUG": "WARN",
        "LINES": "a\nb",
        "PATH": "/",
    }
    lines = Path(write_exports(tmp_path / "out", variables)).read_text().splitlines()
    assert lines == [
        "TRIFOLD_SUPERVISOR=h:1",
        "TRIFOLD_SECRET_FILE=/f",
        "NCCL_DEBUG=WARN",
        *["NCCL_DEBUG=INFO"] * 2,
    ]  # the last one holds


def test_the_secret_is_in_a_file_of_its_owner_while_it_is_needed(tmp_path):
    (tmp_path / "secret_left.txt").touch()
    with secret_file(tmp_path, "s" * 40) as name:
        assert list(tmp_path.iterdir()) == [Path(name)]
        assert Path(name).stat().st_mode & 0o777 == 0o600
        assert read_secret({SECRET_FILE: name}) == "s" * 40
    assert list(tmp_path.iterdir()) == []


def test_a_secret_of_the_users_own_is_one_that_nobody_else_reads(tmp_path, monkeypatch):
    path = tmp_path / "secret"
    path.write_text("m" * 32)
    monkeypatch.setenv(SECRET_FILE, str(path))
    with pytest.raises(UsageError, match=f"{path}: other users may read the secret; run `chmod 600` on it"):
        _given_secret()
    path.chmod(0o600)
    assert _given_secret() == "m" * 32
    monkeypatch.setenv(SECRET_FILE, str(tmp_path / "none"))
    with pytest.raises(UsageError, match="No such file"):
        _given_secret()


@pytest.mark.parametrize(("name", "value"), [("MASTER_PORT", "1; reboot"), ("MASTER_PORT", "$(reboot)"), ("--master", "-oA=b")])
def test_a_value_that_is_no_port_or_host_is_refused(tmp_path, monkeypatch, name, value):
    monkeypatch.setenv("MASTER_PORT", value if name == "MASTER_PORT" else "29777")
    with pytest.raises(UsageError, match=f"{name}='"):
        fill_words("deepspeed {port} {master}", tmp_path, {"a": 1}, value if name == "--master" else "a")


HOSTILE = """a  b'"$(touch OBEYED)`touch OBEYED`\\\\ $HOME %n %h %% ;touch OBEYED;&|*~!#{x} é"""


@pytest.mark.skipif(shutil.which("pdsh") is None, reason="pdsh is not installed")
def test_words_and_variables_pass_deepspeed_pdsh_and_the_shell_of_a_host_as_they_are(tmp_path, monkeypatch):
    from deepspeed.launcher.multinode_runner import PDSHRunner

    (tmp_path / "bin").mkdir()
    ssh = tmp_path / "bin" / "ssh"  # as sshd does: one line for a shell
    ssh.write_text('#!/bin/sh\nwhile [ "$1" != here ]; do shift; done\nshift\nexec sh -c "$*"\n')
    ssh.chmod(0o755)
    folder = tmp_path / HOSTILE.replace("/", "")
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    program = folder / "its words.py"
    program.write_text("import json, os, sys\njson.dump([sys.argv, os.getcwd(), os.environ['WORDS']], open(sys.argv[-1], 'w'))\n")
    words = [str(program), "--out-dir", HOSTILE, "", "-", str(tmp_path / "found.json")]
    command = complete(["deepspeed", "{packed}"], words, {"PATH": "/usr/bin", "OTHER": "$(x)"})
    lines = Path(write_exports(tmp_path / "exports", {"TRIFOLD_EXPORTS": "WORDS", "WORDS": HOSTILE})).read_text().splitlines()

    script, packed = command[1:]
    arguments = {"user_script": script, "user_args": [packed], "launcher_args": "", "master_addr": "h", "master_port": 1}
    flags = ["ssh_port", "venv_script", "no_python", "module", "no_local_rank", "save_pid", "enable_each_rank_log"]
    monkeypatch.chdir("/")
    runner = PDSHRunner(SimpleNamespace(**arguments, **dict.fromkeys(flags)), "world")
    for line in lines:
        runner.add_export(*line.split("=", 1))
    variables = dict(os.environ)
    shell, _, _ = runner.get_cmd(variables, {"here": [0]})
    launch = shell.index("deepspeed.launcher.launch") - 1
    shell[launch : shell.index(script)] = []  # python -u SCRIPT PACKED, without the ranks in between
    variables |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(shell, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == [words, str(folder), HOSTILE]
    assert not list(tmp_path.rglob("OBEYED")) and not Path("/OBEYED").exists()


def test_what_deepspeed_would_hand_to_shells_as_it_is_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/my venv/bin/python")
    variables = {"PATH": "/a b", "NCCL_DEBUG_FILE": "/x/%h", "PYTHONPATH": "$(reboot)", "MINE": "$(x)"}
    with pytest.raises(UsageError) as error:
        complete(["deepspeed", "{packed}"], ["r.py"], variables)
    told = [line.split("=")[0].split(":")[0] for line in str(error.value).splitlines()]
    assert told == ["/my venv/bin/python", "NCCL_DEBUG_FILE", "PYTHONPATH"]
