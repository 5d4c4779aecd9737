"""The command and the environment that an attempt is started with."""

from pathlib import Path

from recipes.common.runtime.authenticated_link import SECRET, SECRET_FILE, read_secret
from recipes.common.runtime.supervisor_link import SUPERVISOR
from tools.supervise.hosts import read_hostfile
from tools.supervise.launcher import fill_words, secret_file, write_exports


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
